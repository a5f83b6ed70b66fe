"""The `[model]` table: which model is loaded, where, and what of it is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedmllm.config.base import Positive, Table, at_most


class LoraTable(Table):
    rank: Annotated[Positive, at_most(8192, "the width of the largest models")] = 8
    alpha: Annotated[float, Field(gt=0), at_most(65_536, "because the adapter is multiplied by alpha / rank")] = 8.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target: str | None = None
    """A regular expression for module names, or presets joined by "+": "attention", "all-linear", "text", "vision",
    "projector". By default "attention": q, k, v, o of the text model's attention."""
    whole: Literal["none", "projector"] = "none"
    """"projector" trains the connector between vision tower and text model whole, beside LoRA."""


class AdapterTable(Table):
    kind: Literal["lora", "rslora", "dora", "lora-xs", "ia3", "prompt-tuning"] = "lora"
    """The kind of adapter that is trained. The first four use the settings of `model.lora`."""
    virtual_tokens: Annotated[Positive, at_most(4096, "because every prompt becomes longer by this many tokens")] = 8
    """The number of trained vectors before every prompt, for "prompt-tuning"."""


class ModelTable(Table):
    name: str = "pocket"
    """"pocket", the id of a Hugging Face model, or a local folder."""
    adapter: AdapterTable = AdapterTable()
    lora: LoraTable = LoraTable()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    device_map: Literal["none", "auto"] = "none"
    """"auto" spreads the layers over all GPUs, by accelerate."""
    cache_features: bool = True
    quantize: Literal["none", "4bit"] = "none"
    """"4bit" stores the frozen weights as nf4 (bitsandbytes, on a GPU)."""
    trust_remote_code: bool = False
    """Allow code from the model's repository to run."""

    def check(self) -> None:
        """Raises ValueError for keys that exclude each other."""
        if self.device_map == "auto" and self.device != "auto":
            raise ValueError(
                f'model.device = {self.device!r} names one device, and model.device_map = "auto" uses all GPUs; leave one of '
                "them out."
            )
        if self.device_map == "auto" and self.quantize != "none":
            raise ValueError(
                f'model.quantize = {self.quantize!r} keeps the model on one GPU, and model.device_map = "auto" spreads it over '
                'all; set one of them to "none".'
            )
        whole = self.lora.whole == "projector"
        used = {"target": self.lora.target is not None, "whole": whole}
        if unused := [key for key, is_set in used.items() if is_set and self.adapter.kind in ("ia3", "prompt-tuning")]:
            raise ValueError(
                f"model.lora.{unused[0]} is set and model.adapter.kind = {self.adapter.kind!r} does not use it; "
                "leave one of them out."
            )
        if whole and "projector" in (self.lora.target or "").split("+"):
            raise ValueError(
                f'model.lora.target = {self.lora.target!r} puts LoRA on the connector, which model.lora.whole = "projector" '
                "trains whole; leave one of them out."
            )
        if whole and self.quantize != "none":
            raise ValueError(
                f'model.lora.whole = "projector" trains the weights themselves, which model.quantize = {self.quantize!r} '
                'stores in 4 bits; set one of them to "none".'
            )

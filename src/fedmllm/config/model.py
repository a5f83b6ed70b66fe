"""The `[model]` table: which model is loaded, where, and what of it is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedmllm.config.base import Positive, Table, at_most


class LoraTable(Table):
    rank: Annotated[Positive, at_most(8192, "the width of the largest models")] = 8
    """The rank of the adapter on the server."""
    alpha: Annotated[float, Field(gt=0), at_most(65_536, "because the adapter is multiplied by alpha / rank")] = 8.0
    """The adapter is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of the adapter's inputs that are dropped in training."""
    target: str | None = None
    """[What LoRA adapts](models.md#which-parts-are-trained): presets joined by `+` (`"attention"`, `"all-linear"`, `"text"`,
    `"vision"`, `"projector"`), or a regular expression for module names. By default `"attention"`: q, k, v, o of the text
    model's attention."""
    whole: Literal["none", "projector"] = "none"
    """`"projector"` trains the connector between vision tower and text model whole, beside LoRA."""


class AdapterTable(Table):
    kind: Literal["lora", "rslora", "dora", "lora-xs", "ia3", "prompt-tuning"] = "lora"
    """What is trained, all through PEFT: `"rslora"` has the scale alpha / √rank, `"lora-xs"` [a square matrix between frozen
    factors](algorithms.md#lora-xs-and-fed-sb). The first four use the settings of `model.lora`. Methods that work on LoRA's
    factors need one of the first two."""
    virtual_tokens: Annotated[Positive, at_most(4096, "because every prompt becomes longer by this many tokens")] = 8
    """The number of trained vectors before every prompt, for `"prompt-tuning"`."""


class ModelTable(Table):
    name: str = "pocket"
    """`"pocket"` or `"pocket-qwen"`, which are shipped; the id of a Hugging Face model; or a local folder. See
    [models](models.md)."""
    adapter: AdapterTable = AdapterTable()
    lora: LoraTable = LoraTable()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`"auto"`: bfloat16 on GPUs, and on CPUs that have bfloat16 dot products if the model is at least 512 wide; else
    float32."""
    device: str = "auto"
    """A device of PyTorch, such as `"cuda:1"`; `"auto"`: a GPU if there is one."""
    device_map: Literal["none", "auto"] = "none"
    """`"auto"` spreads the layers over [all GPUs of the machine](models.md#several-gpus), by accelerate."""
    cache_features: bool = True
    """Store the outputs of the frozen vision tower in `$FEDMLLM_CACHE`, by default the user's cache folder. They may take
    `$FEDMLLM_CACHE_GB` gigabytes, by default 20, or `inf`; beyond it, what was used longest ago is removed when new features
    are written, but nothing that a run has open."""
    quantize: Literal["none", "4bit"] = "none"
    """`"4bit"` stores the frozen weights [as nf4](models.md#4-bit-weights) (bitsandbytes, on a GPU)."""
    trust_remote_code: bool = False
    """Run code from the model's repository on this machine; read it first."""

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

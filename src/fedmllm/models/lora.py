"""The adapter: attached by PEFT, read and set as flat tensors under PEFT's own file names, exported in PEFT's format.

A fold is a low-rank change of the frozen base that some algorithms send beside the adapter. It is set, never added: setting
it twice changes nothing, and a client that missed rounds needs only the latest.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from fedmllm.errors import ConfigError, RunError
from fedmllm.rng import seed_for
from fedmllm.tensors import Tensors, write_atomically

FOLD_DOWN, FOLD_UP = "fold_A", "fold_B"


def attach(model: Any, target: str, rank: int, alpha: float, dropout: float, seed: int) -> PeftModel:
    """Wrap `model` with a LoRA adapter whose start is a function of `seed`. Raises ConfigError where nothing matches."""
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target, bias="none")
    with torch.random.fork_rng(), warnings.catch_warnings():
        # PEFT asks transformers for a property under its older name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        torch.manual_seed(seed_for(seed, "adapter"))
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            reason = str(error).partition(". ")[0]
            raise ConfigError(f"model.lora.target = {target!r} matches no module of the model ({reason}).") from None


class Adapter:
    """The adapter of one resident model, as tensors that share its memory."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        by_storage = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
        named = get_peft_model_state_dict(model)
        self.parameters: dict[str, nn.Parameter] = {name: by_storage[t.data_ptr()] for name, t in sorted(named.items())}
        self._base: dict[str, Tensor] = {}

    def get(self) -> Tensors:
        """A float32 copy on the CPU, names sorted: `….q_proj.lora_A.weight`: (r, d_in), `….lora_B.weight`: (d_out, r)."""
        return {name: p.detach().to("cpu", torch.float32).clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def set(self, tensors: Tensors) -> None:
        """Write the values in place. Raises ValueError where names or shapes differ from the adapter's."""
        if tensors.keys() != self.parameters.keys():
            odd = min(tensors.keys() ^ self.parameters.keys())
            raise ValueError(f"adapter tensors do not match the model's: {odd!r} is on one side only")
        for name, parameter in self.parameters.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(f"{name!r}: shape {tuple(tensors[name].shape)} is not {tuple(parameter.shape)}")
            parameter.copy_(tensors[name])

    @torch.no_grad()
    def set_fold(self, fold: Tensors) -> None:
        """Make the base W₀ + fold_B fold_A for each module in `fold`, and W₀ for every other one.

        Names are `<module>.fold_A`: (k, d_in) and `<module>.fold_B`: (d_out, k), the LoRA scale already inside.
        """
        modules = {name.rpartition(".")[0] for name in fold}
        for module in sorted(modules | self._base.keys()):
            weight = self._weight_of(module)
            original = self._base.setdefault(module, weight.detach().clone())
            if module in modules:
                change = fold[f"{module}.{FOLD_UP}"].float() @ fold[f"{module}.{FOLD_DOWN}"].float()
                weight.copy_(original.float() + change.to(original.device))
            else:
                weight.copy_(original)

    def _weight_of(self, module: str) -> Tensor:
        layer = self.model.get_submodule(module)
        base = getattr(layer, "base_layer", layer)
        weight = base.weight
        assert isinstance(weight, Tensor)
        return weight

    def export(self, folder: Path, base_name: str) -> None:
        """A standard PEFT adapter folder: loads with `PeftModel.from_pretrained(base, folder)`."""
        config = self.model.peft_config["default"].to_dict()
        config = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
        config |= {"base_model_name_or_path": base_name, "inference_mode": True}
        write_atomically(folder / "adapter_model.safetensors", serialize(self.get(), metadata={"format": "pt"}))
        text = json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"
        write_atomically(folder / "adapter_config.json", text.encode())


def read_adapter(folder: Path) -> Tensors:
    """The tensors of an exported adapter. Raises RunError where the folder does not hold one."""
    try:
        return load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder} holds no readable adapter_model.safetensors ({error}).") from None

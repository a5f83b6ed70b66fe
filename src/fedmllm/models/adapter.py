"""The adapter of a model: read and written as flat tensors under PEFT's own file names, and exported in PEFT's format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save as serialize
from torch import Tensor, nn

from fedmllm.algorithms import AdapterInfo
from fedmllm.algorithms.factors import BASIS_A, BASIS_B, FOLD_A, FOLD_B, A, B, R, is_a, is_b, modules, principal_state, rank_of
from fedmllm.errors import ConfigError, RunError
from fedmllm.models.core import cores
from fedmllm.models.fold import branch_hook, dense_change, factors_with_fold
from fedmllm.storage.atomic import write_atomically
from fedmllm.storage.state_file import load_verified, with_digest
from fedmllm.tensors import State, Tensors

VIRTUAL = "prompt_embeddings"
"""PEFT's name for the vectors of prompt tuning: (virtual tokens, hidden size)."""


def adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The adapter's parameters by the names that PEFT gives them in files, sorted. Raises ConfigError for an embedding."""
    if isinstance(model.peft_config["default"], PromptTuningConfig):
        return {VIRTUAL: model.prompt_encoder["default"].embedding.weight}
    by_storage = {_storage(p): p for p in model.parameters() if p.requires_grad}
    # PEFT would also save the embeddings if its target matches them, but those are frozen.
    named = get_peft_model_state_dict(model, save_embedding_layers=False)
    embeddings = sorted(name for name in named if "lora_embedding" in name)
    if embeddings:
        raise ConfigError(f"model.lora.target matches an embedding ({embeddings[0]!r}); let it match linear layers only.")
    trained = {name.replace(".lora_B.core", R): t for name, t in named.items() if _storage(t) in by_storage}
    return {name: by_storage[_storage(t)] for name, t in sorted(trained.items())}


def _storage(tensor: Tensor) -> int:
    """Tensors that share memory have the same number, also on the meta device, where addresses are 0."""
    return int(tensor.untyped_storage()._cdata)


def on_several_devices(parameters: Mapping[str, nn.Parameter]) -> bool:
    return len({parameter.device for parameter in parameters.values()}) > 1


def _move_gradient(total: Tensor, parameter: Tensor) -> None:
    """Add the parameter's gradient to `total`, which may be on another device, and remove it."""
    assert parameter.grad is not None
    total += parameter.grad.to(total.device)
    parameter.grad = None


class Adapter:
    """The adapter of one loaded model, as tensors that share its memory.

    A LoRA adapter of a lower rank than the model's can be set: its factors are padded with zeros, which have no gradient and
    stay zero, and the model uses the scale of the lower rank. `get` and `export` then return the lower rank.
    """

    def __init__(self, model: PeftModel, info: AdapterInfo) -> None:
        self.model, self.info = model, info
        self.config = model.peft_config["default"]
        self.parameters = adapter_parameters(model)
        self._layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        self.cores = cores(model)
        """module -> A and B of a LoRA-XS adapter, which has R in between; empty for any other."""
        self.low_rank = isinstance(self.config, LoraConfig) and not self.config.use_dora
        """Whether the adapter adds products of LoRA factors, `factors`, and nothing else."""
        self.plain_lora = self.low_rank and not self.cores
        """Whether those factors are its tensors."""
        self.rank: int = self.config.r if self.low_rank else 0
        self._share = 1.0
        in_text = self.parameters.keys() <= info.layer.keys() and all(p.dim() == 2 for p in self.parameters.values())
        self.spread = on_several_devices(self.parameters)
        """Whether it is on several GPUs, each with its part of the model."""
        self.stacks = self.low_rank and in_text and not self.spread
        """Whether the adapters of several clients can be stacked (`Stack`). This requires one device and the rows of a batch to
        stay separate, as they do in the linear layers of the text model; a vision tower may join the patches of all
        pictures."""
        self.fold: Tensors = {}
        """The fold that was set last. As long as this is the same object, the base weights are unchanged."""
        self._original: dict[str, Tensor] = {}
        self._own_basis = {m: (a.clone(), b.clone()) for m, (a, b) in self.cores.items()}
        self._branches: dict[str, Any] = {}

    @property
    def sizes(self) -> dict[str, int]:
        """The number of trained parameters in each part of the model: "text", "vision", "projector"."""
        counts: Counter[str] = Counter()
        for name, parameter in self.parameters.items():
            counts[self.info.part(name)] += parameter.numel()
        return dict(counts)

    # The adapter's tensors

    def part(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        """The part of a tensor of the model's rank that an adapter of rank `rank` uses; a view."""
        if not self.plain_lora:
            return tensor
        return tensor[:rank] if is_a(name) else tensor[:, :rank] if is_b(name) else tensor

    def rank_in(self, tensors: Tensors) -> int:
        """The LoRA rank of these tensors. Raises ValueError if names or shapes do not fit the adapter's."""
        if tensors.keys() != self.parameters.keys():
            odd = min(tensors.keys() ^ self.parameters.keys())
            raise ValueError(f"adapter tensors do not match the model's: only one of the two has {odd!r}")
        rank = rank_of(tensors) if self.plain_lora else self.rank
        for name, parameter in self.parameters.items():
            expected = self.part(name, parameter, rank).shape
            if expected != tensors[name].shape:
                raise ValueError(f"{name!r}: shape {tuple(tensors[name].shape)} is not {tuple(expected)}")
        return rank

    def pairs(self) -> list[tuple[nn.Module, str, str]]:
        """(base layer, name of its A in `factors`, name of its B) of each LoRA layer."""
        if self.cores:
            return [(self.model.get_submodule(m).get_base_layer(), m + A, m + B) for m in self.cores]
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        layers = [(layer.get_base_layer(), layer.lora_A["default"], layer.lora_B["default"]) for layer in self._layers]
        return [(base, names[id(a.weight)], names[id(b.weight)]) for base, a, b in layers]

    def factors(self, tensors: Tensors) -> Tensors:
        """LoRA's factors A: (…, r, d_in) and B: (…, d_out, r), of which tensors (…, *shape) of this adapter consist."""
        if not self.cores:
            return tensors
        new: Tensors = {}
        for m, (a, b) in self.cores.items():
            core = tensors[m + R]
            new |= {m + A: a.to(core.device).expand(*core.shape[:-2], *a.shape), m + B: b.to(core.device) @ core}
        return new

    def get(self) -> Tensors:
        """A float32 copy on the CPU, names sorted: `….q_proj.lora_A.weight`: (r, d_in), `….lora_B.weight`: (d_out, r)."""
        parts = {n: self.part(n, p.detach(), self.rank) for n, p in self.parameters.items()}
        return {n: t.to("cpu", torch.float32).clone() for n, t in parts.items()}

    @torch.no_grad()
    def set(self, tensors: Tensors) -> None:
        """Write the values in place. Raises ValueError if names or shapes do not fit the adapter's."""
        self._rescale(self.rank_in(tensors))
        for name, parameter in self.parameters.items():
            target = self.part(name, parameter, self.rank)
            if target.shape != parameter.shape:
                parameter.zero_()
            target.copy_(tensors[name])

    def _rescale(self, rank: int, share: float = 1.0) -> None:
        if (rank, share) != (self.rank, self._share):
            self.rank, self._share = rank, share
            for layer in self._layers:
                layer.scaling["default"] = share * self.info.scale(rank)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute with the base of each LoRA layer alone. PEFT's `disable_adapter` switches the same layers off, but examines
        every module and parameter of the model first, which takes as long as a step of a small model."""
        enabled = [layer for layer in self._layers if not layer.disable_adapters]
        for layer in enabled:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in enabled:
                layer.enable_adapters(True)

    @contextmanager
    def replaced(self, values: Tensors, grads: Tensors, rank: int, share: float = 1.0) -> Iterator[None]:
        """Compute with `values` (of the model's rank) instead of the adapter's own memory, with `share` times the scale of
        `rank`.

        Gradients are accumulated in `grads`; a tensor that is not in `grads` is not trained. An adapter on several devices
        computes with copies there: call `refresh` when `values` have changed.
        """
        own, own_rank = {name: parameter.data for name, parameter in self.parameters.items()}, self.rank
        self._rescale(rank, share)
        hooks = ExitStack()
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in grads)
            if self.spread:
                parameter.data = values[name].to(parameter.device, copy=True)
                if name in grads:
                    hook = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                        partial(_move_gradient, grads[name])
                    )
                    hooks.callback(hook.remove)
            else:
                parameter.data, parameter.grad = values[name], grads.get(name)
        try:
            yield
        finally:
            hooks.close()
            self._rescale(own_rank)
            for name, parameter in self.parameters.items():
                parameter.data, parameter.grad = own[name], None
                parameter.requires_grad_(True)

    def refresh(self, values: Tensors) -> None:
        """Copy `values` to the devices of an adapter on several of them."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(values[name])

    # The base weights

    @cached_property
    def principal(self) -> State:
        """`AdapterInfo.principal`, computed once: the largest singular values of the base weights W₀, without any fold."""
        weights = {}
        for base, a, _ in self.pairs():
            module = a.removesuffix(A)
            weight = self._original[module] if module in self._original else dequantize_module_weight(base)
            weights[module] = weight.detach().to("cpu", torch.float32)
        rank = int(self.config.r)
        return principal_state(weights, rank, self.info.scale(rank))

    @property
    def basis(self) -> Tensors:
        """`AdapterInfo.basis`: copies on the CPU of the factors that belong to the base weights."""
        return {m + side: t.cpu() for m, pair in self._own_basis.items() for side, t in zip((A, B), pair, strict=True)}

    # The fold

    @torch.no_grad()
    def set_fold(self, fold: Tensors) -> None:
        """Make the base W₀ + fold for each module in `fold`, and W₀ for every other one.

        Names are `<module>.fold_A`: (k, d_in) and `<module>.fold_B`: (d_out, k), or `<module>.fold`: (d_out, d_in); the LoRA
        scale is already included. Weights in float32 are changed in place. The precision of other weights (bfloat16,
        quantised) is too coarse for a fold, so it is computed in a separate branch next to these layers.

        `<module>.basis_A` and `<module>.basis_B` change no base: they replace the frozen factors of a LoRA-XS adapter.
        """
        if fold is self.fold:
            return
        for m, factors in self.cores.items():
            for factor, own, name in zip(factors, self._own_basis[m], (m + BASIS_A, m + BASIS_B), strict=True):
                factor.copy_(fold.get(name, own))
        folded = {name.rpartition(".")[0] for name in fold if not name.endswith((BASIS_A, BASIS_B))}
        for branch in self._branches.values():
            branch.remove()
        self._branches.clear()
        for module in sorted(folded | self._original.keys()):
            layer = self.model.get_submodule(module)
            base = getattr(layer, "base_layer", layer)
            if base.weight.dtype != torch.float32:
                # This weight is never written, so removing the branch is enough to restore W₀.
                self._branches[module] = base.register_forward_hook(branch_hook(module, fold, base.weight.device))
                continue
            original = self._original.setdefault(module, base.weight.detach().clone())
            change = dense_change(module, fold, original.device) if module in folded else 0
            base.weight.copy_(original + change)
        self.fold = fold

    # Files

    def export(self, folder: Path, base_name: str) -> None:
        """Write a standard PEFT adapter folder, which loads with `PeftModel.from_pretrained(base, folder)`.

        A fold is included in the LoRA factors, as one equivalent adapter of higher rank. LoRA-XS is written as LoRA.
        """
        tensors, config = self.factors(self.get()), self.config.to_dict()
        if self.plain_lora:
            config["r"] = self.rank
        if self.fold or self.cores:
            tensors = factors_with_fold(tensors, self.fold, self.info.scale(self.rank))
            config |= {"r": rank_of(tensors), "lora_alpha": rank_of(tensors), "use_rslora": False}
        config = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
        config |= {"base_model_name_or_path": base_name, "inference_mode": True}
        metadata = with_digest(tensors, {"format": "pt"})
        write_atomically(folder / "adapter_model.safetensors", serialize(tensors, metadata=metadata))
        text = json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"
        write_atomically(folder / "adapter_config.json", text.encode())

    def load(self, folder: Path) -> None:
        """Set an adapter that `export` wrote: one with a fold, or of LoRA-XS, is set as a fold, and the rest of it is 0. Raises
        RunError if the folder does not contain an adapter of this kind."""
        tensors = read_adapter(folder)
        try:
            if self.cores or (self.plain_lora and rank_of(tensors) > self.config.r):
                fold = {m + FOLD_A: tensors[m + A] for m in modules(tensors)}
                fold |= {m + FOLD_B: tensors[m + B] for m in modules(tensors)}
                self.set_fold(fold)
                tensors = {n: torch.zeros_like(p, device="cpu") for n, p in self.parameters.items()}
            else:
                self.set_fold({})
            self.set(tensors)
        except (ValueError, StopIteration) as error:
            raise RunError(f"{folder} contains an adapter of another kind ({error}).") from None


def read_adapter(folder: Path) -> Tensors:
    """The tensors of an exported adapter. Raises RunError if the folder does not contain one, or a damaged one."""
    try:
        return load_verified(folder / "adapter_model.safetensors")[0]
    except ValueError as error:
        raise RunError(
            f"{folder} contains no readable adapter_model.safetensors ({error}); run the experiment again."
        ) from None

"""The adapter: attached by PEFT, read and set as flat tensors under PEFT's own file names, exported in PEFT's format.

A fold is a low-rank change of the frozen base that some algorithms send beside a LoRA adapter. It is set, never added:
setting it twice changes nothing, and a client that missed rounds needs only the latest.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, PromptTuningInit, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from fedmllm.algorithms import AdapterInfo
from fedmllm.algorithms.factors import FOLD, FOLD_A, FOLD_B, A, B, is_a, is_b, modules, rank_of
from fedmllm.config import ModelTable
from fedmllm.errors import ConfigError, RunError
from fedmllm.models.families import Family
from fedmllm.rng import seed_for
from fedmllm.storage.atomic import write_atomically
from fedmllm.tensors import Tensors

if TYPE_CHECKING:
    from fedmllm.models.stack import Stack

VIRTUAL = "prompt_embeddings"
"""PEFT's name for the vectors of prompt tuning: (virtual tokens, hidden size)."""


def peft_config(settings: ModelTable, family: Family) -> PeftConfig:
    """What PEFT calls the adapter that the settings ask for."""
    kind, lora = settings.adapter.kind, settings.lora
    if kind == "prompt-tuning":
        # From the vocabulary's own vectors, because random ones are much longer than those and drown the prompt.
        start = PromptTuningInit.SAMPLE_VOCAB
        return PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=settings.adapter.virtual_tokens, prompt_tuning_init=start
        )
    if kind == "ia3":
        return IA3Config(target_modules=family.ia3_target, feedforward_modules=family.ia3_feedforward)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target or family.target,
        bias="none",
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
    )


@contextmanager
def _as_peft_likes_it(seed: int) -> Iterator[None]:
    """A generator of our own, and no word of a property that PEFT asks transformers for under its older name."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("error", message=".*tie_word_embeddings.*", category=UserWarning)
        torch.manual_seed(seed_for(seed, "adapter"))
        yield


def attach(model: Any, settings: ModelTable, family: Family, seed: int) -> PeftModel:
    """Wrap `model` with an adapter whose start is a function of `seed`. Raises ConfigError where nothing matches."""
    config = peft_config(settings, family)
    with _as_peft_likes_it(seed):
        try:
            return get_peft_model(model, config)
        except UserWarning:  # a fold would change both at once, and a merged head is not what was trained
            raise ConfigError(
                f"model.lora.target = {settings.lora.target!r} takes in the embedding or the head, which share one weight in "
                "this model; let it match other layers only."
            ) from None
        except ValueError as error:
            reason = str(error).partition(". ")[0]
            kind, wanted = settings.adapter.kind, settings.lora.target
            if wanted:
                raise ConfigError(f"model.lora.target = {wanted!r} matches no module of the model ({reason}).") from None
            raise ConfigError(
                f"model.adapter.kind = {kind!r} finds nothing to adapt in this model ({reason}); set model.lora.target to a "
                "regular expression over its module names."
            ) from None


def _parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """PEFT's file names, sorted, and the parameters that they stand for."""
    if isinstance(model.peft_config["default"], PromptTuningConfig):
        return {VIRTUAL: model.prompt_encoder["default"].embedding.weight}
    by_storage = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
    # Without the embeddings that PEFT would save beside the adapter where its target touches them: those are frozen.
    named = get_peft_model_state_dict(model, save_embedding_layers=False)
    odd = sorted(name for name in named if "lora_embedding" in name)
    if odd:
        raise ConfigError(f"model.lora.target takes in an embedding ({odd[0]!r}); let it match linear layers only.")
    return {name: by_storage[t.data_ptr()] for name, t in sorted(named.items())}


def tensor_names(model: PeftModel) -> list[str]:
    return list(_parameters(model))


class Adapter:
    """The adapter of one resident model, as tensors that share its memory.

    A LoRA adapter of lower rank than the model's can be set: its rows are filled up with zeros, which have no gradient and
    stay zero, and the model scales by that rank. `get` and `export` then speak of the lower rank.
    """

    def __init__(self, model: PeftModel, info: AdapterInfo) -> None:
        self.model, self.info = model, info
        self.config = model.peft_config["default"]
        self.parameters = _parameters(model)
        self._layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        self.plain_lora = isinstance(self.config, LoraConfig) and not self.config.use_dora
        self.rank: int = self.config.r if self.plain_lora else 0
        # Rows of a batch can be told apart by client in the text model's linear layers alone: a vision tower may join its
        # pictures' patches.
        in_text = self.parameters.keys() <= info.layer.keys() and all(p.dim() == 2 for p in self.parameters.values())
        self.stacks = self.plain_lora and in_text
        self.beside: Stack | None = None
        """The adapters of several clients that the model computes with at the moment, in the place of its own."""
        self._fold: Tensors = {}
        self._base: dict[str, Tensor] = {}
        self._branches: dict[str, Any] = {}

    # The adapter's tensors

    def part(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        """What of a tensor of the model's rank belongs to `rank`; a view."""
        if not self.plain_lora:
            return tensor
        return tensor[:rank] if is_a(name) else tensor[:, :rank] if is_b(name) else tensor

    def rank_in(self, tensors: Tensors) -> int:
        """The LoRA rank of these tensors. Raises ValueError where names or shapes do not fit the adapter's."""
        if tensors.keys() != self.parameters.keys():
            odd = min(tensors.keys() ^ self.parameters.keys())
            raise ValueError(f"adapter tensors do not match the model's: {odd!r} is on one side only")
        rank = rank_of(tensors) if self.plain_lora else self.rank
        for name, parameter in self.parameters.items():
            wanted = self.part(name, parameter, rank).shape
            if wanted != tensors[name].shape:
                raise ValueError(f"{name!r}: shape {tuple(tensors[name].shape)} is not {tuple(wanted)}")
        return rank

    def pairs(self) -> list[tuple[nn.Module, str, str]]:
        """(base layer, name of its A, name of its B) of each LoRA layer."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        halves = [(layer.get_base_layer(), layer.lora_A["default"], layer.lora_B["default"]) for layer in self._layers]
        return [(base, names[id(a.weight)], names[id(b.weight)]) for base, a, b in halves]

    def get(self) -> Tensors:
        """A float32 copy on the CPU, names sorted: `….q_proj.lora_A.weight`: (r, d_in), `….lora_B.weight`: (d_out, r)."""
        parts = {n: self.part(n, p.detach(), self.rank) for n, p in self.parameters.items()}
        return {n: t.to("cpu", torch.float32).clone() for n, t in parts.items()}

    @torch.no_grad()
    def set(self, tensors: Tensors) -> None:
        """Write the values in place. Raises ValueError where names or shapes do not fit the adapter's."""
        self._rescale(self.rank_in(tensors))
        for name, parameter in self.parameters.items():
            wanted = self.part(name, parameter, self.rank)
            if wanted.shape != parameter.shape:
                parameter.zero_()
            wanted.copy_(tensors[name])

    def _rescale(self, rank: int) -> None:
        if rank != self.rank:
            self.rank = rank
            for layer in self._layers:
                layer.scaling["default"] = self.info.scale(rank)

    @contextmanager
    def lent(self, values: Tensors, grads: Tensors, rank: int) -> Iterator[None]:
        """The model computes with `values`, of the model's rank, in the place of the adapter's own memory, and scales by
        `rank`. Gradients add up in `grads`; a tensor without an entry there is not trained."""
        own, before = {name: parameter.data for name, parameter in self.parameters.items()}, self.rank
        self._rescale(rank)
        for name, parameter in self.parameters.items():
            parameter.data, parameter.grad = values[name], grads.get(name)
            parameter.requires_grad_(name in grads)
        try:
            yield
        finally:
            self._rescale(before)
            for name, parameter in self.parameters.items():
                parameter.data, parameter.grad = own[name], None
                parameter.requires_grad_(True)

    # The fold

    @property
    def fold(self) -> Tensors:
        """What was set last; another object where the base weights may be others."""
        return self._fold

    @torch.no_grad()
    def set_fold(self, fold: Tensors) -> None:
        """Make the base W₀ + fold for each module in `fold`, and W₀ for every other one.

        Names are `<module>.fold_A`: (k, d_in) and `<module>.fold_B`: (d_out, k), or `<module>.fold`: (d_out, d_in), the LoRA
        scale already inside. Weights in float32 are changed; beside others (bfloat16, quantised), whose steps are coarser
        than a fold, it runs as a branch of its own.
        """
        if fold is self._fold:
            return
        folded = {name.rpartition(".")[0] for name in fold}
        for branch in self._branches.values():
            branch.remove()
        self._branches.clear()
        for module in sorted(folded | self._base.keys()):
            layer = self.model.get_submodule(module)
            base = getattr(layer, "base_layer", layer)
            if base.weight.dtype != torch.float32:
                # Its weight was never touched: without a branch it is W₀ again.
                self._branches[module] = base.register_forward_hook(_branch(module, fold, base.weight.device))
                continue
            original = self._base.setdefault(module, base.weight.detach().clone())
            change = _dense(module, fold, original.device) if module in folded else 0
            base.weight.copy_(original + change)
        self._fold = fold

    # Files

    def export(self, folder: Path, base_name: str) -> None:
        """A standard PEFT adapter folder: loads with `PeftModel.from_pretrained(base, folder)`.

        Where a fold is set, it is stacked onto the LoRA factors: one adapter of higher rank that does the same.
        """
        tensors, config = self.get(), self.config.to_dict()
        if self.plain_lora:
            config["r"] = self.rank
        if self._fold:
            tensors = _with_fold(tensors, self._fold, self.info.scale(self.rank))
            config |= {"r": rank_of(tensors), "lora_alpha": rank_of(tensors), "use_rslora": False}
        config = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
        config |= {"base_model_name_or_path": base_name, "inference_mode": True}
        write_atomically(folder / "adapter_model.safetensors", serialize(tensors, metadata={"format": "pt"}))
        text = json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"
        write_atomically(folder / "adapter_config.json", text.encode())

    def load(self, folder: Path) -> None:
        """Set what `export` wrote. Raises RunError where the folder does not hold an adapter of this kind."""
        tensors = read_adapter(folder)
        try:
            if self.plain_lora and rank_of(tensors) > self.config.r:  # one with a fold
                fold = {m + FOLD_A: tensors[m + A] for m in modules(tensors)}
                fold |= {m + FOLD_B: tensors[m + B] for m in modules(tensors)}
                self.set_fold(fold)
                tensors = {n: torch.zeros_like(p, device="cpu") for n, p in self.parameters.items()}
            else:
                self.set_fold({})
            self.set(tensors)
        except (ValueError, StopIteration) as error:
            raise RunError(f"{folder} holds an adapter of another kind ({error}).") from None


def _dense(module: str, fold: Tensors, device: torch.device) -> Tensor:
    """The change of the module's weight: (d_out, d_in)."""
    if module + FOLD in fold:
        return fold[module + FOLD].to(device)
    return fold[module + FOLD_B].to(device) @ fold[module + FOLD_A].to(device)


def _branch(module: str, fold: Tensors, device: torch.device) -> Any:
    """A forward hook that adds the fold's output to a linear layer's."""
    names = (FOLD,) if module + FOLD in fold else (FOLD_A, FOLD_B)
    weights = [fold[module + name].to(device) for name in names]

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].float()
        for weight in weights:
            x = nn.functional.linear(x, weight)
        return output + x.to(output.dtype)

    return add


def _with_fold(adapter: Tensors, fold: Tensors, scale: float) -> Tensors:
    """LoRA factors of scale 1 for s B A + fold, all modules at the rank of the longest."""
    stacked: dict[str, tuple[Tensor, Tensor]] = {}
    for m in modules(adapter):
        right, left = adapter[m + A], adapter[m + B] * scale
        if m + FOLD in fold:
            change = fold[m + FOLD]
            d_out, d_in = change.shape
            # Exact and of the least rank that any matrix of this shape may need: the change beside an identity.
            extra = (torch.eye(d_out), change) if d_out <= d_in else (change, torch.eye(d_in))
            right, left = torch.cat((right, extra[1])), torch.cat((left, extra[0]), dim=1)
        elif m + FOLD_A in fold:
            right, left = torch.cat((right, fold[m + FOLD_A])), torch.cat((left, fold[m + FOLD_B]), dim=1)
        stacked[m] = (right, left)
    longest = max(right.shape[0] for right, _ in stacked.values())
    whole: Tensors = {}
    for m, (right, left) in stacked.items():
        more = longest - right.shape[0]
        whole[m + A] = torch.cat((right, right.new_zeros(more, right.shape[1])))
        whole[m + B] = torch.cat((left, left.new_zeros(left.shape[0], more)), dim=1)
    return whole


def read_adapter(folder: Path) -> Tensors:
    """The tensors of an exported adapter. Raises RunError where the folder does not hold one."""
    try:
        return load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder} holds no readable adapter_model.safetensors ({error}).") from None

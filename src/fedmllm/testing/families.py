"""The contract of model families."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment

from fedmllm.data.prompts import Conversation
from fedmllm.models.families import families
from fedmllm.testing.registered import check_registered

NAMES = (
    "model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
    "model.text_model.layers.11.mlp.down_proj.weight",
    "model.vision_model.encoder.layers.0.self_attn.q_proj.weight",
    "lm_head.weight",
)
"""Names of tensors as transformers and PEFT give them."""


def check_family(name: str, checkpoint: Path | None = None, **options: Any) -> None:
    """The family's patterns and templates are valid. With the folder of a small `checkpoint` of the family, the model is also
    loaded with an adapter, and its losses for a batch must equal those for single samples."""
    check_registered(families, name)
    family, part = families.build(name, options), f"family {name!r}"
    for pattern in (family.target, family.ia3_target, family.ia3_feedforward):
        re.compile(pattern)
    for tensor in NAMES:
        layer = family.layer_of(tensor)
        assert layer is None or (isinstance(layer, int) and layer >= 0), f"{part}: layer_of({tensor!r}) is {layer!r}"
    conversation = Conversation("a question", "an answer", image=False)
    if family.template is not None:
        prompt = Environment().from_string(family.template).render(messages=conversation.messages(), add_generation_prompt=True)
        assert conversation.user in prompt, f"{part}: the question is not in the template's prompt {prompt!r}"
    if family.text_prompt is not None:
        prompt = family.text_prompt.format(begin="<s>", prompt=conversation.user)
        assert conversation.user in prompt, f"{part}: `text_prompt` leaves the question out"
    if checkpoint is not None:
        _check_model(checkpoint, part)


def _check_model(checkpoint: Path, part: str) -> None:
    # Imported here, so that importing `fedmllm.testing` does not import transformers.
    from fedmllm.config import LoraTable, ModelTable
    from fedmllm.models.mllm import MLLM

    model = MLLM.load(ModelTable(name=str(checkpoint), lora=LoraTable(rank=2), precision="fp32"), seed=0)
    assert model.adapter.parameters, f"{part}: `target` matches no module of the model"
    layers = range(model.info.layers)
    assert set(model.info.layer.values()) <= set(layers), f"{part}: `layer_of` names a layer that the model does not have"
    first = Conversation("name the color.", "red", image=False)
    conversations = [first, replace(first, user="a longer text\nname the color.", answer="dark blue")]
    batch = model.encode(conversations, [None, None], 300)
    together, single = model.losses(batch), [model.loss([encoded]) for encoded in batch]
    for loss, alone in zip(together.tolist(), single, strict=True):
        assert abs(loss - alone.item()) < 1e-4, f"{part}: the loss of a sample is {loss} in a batch and {alone.item()} alone"

"""A model card: what a trained model was trained on, how good it is, and how it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedmllm.models.shipped import SHIPPED
from fedmllm.report.page import Markdown, Page
from fedmllm.report.tables import method, percent

_CITATION = """@article{fedmllm,
  title = {FedMLLM: Federated Fine-tuning MLLM on Multimodal Heterogeneity Data},
  journal = {arXiv preprint arXiv:2411.14717},
  year = {2024}
}"""


def loading(folder: str, processor: str, merged: bool, prompt_tuning: bool, base: str) -> str:
    """The lines of Python that load an exported model; `processor` names the folder or model that has the processor."""
    model = "AutoModelForImageTextToText"
    if merged:
        imports, load = [f"from transformers import {model}, AutoProcessor"], f"{model}.from_pretrained({folder!r})"
    elif prompt_tuning:
        imports = ["from peft import PeftModel", f"from transformers import {model}, AutoProcessor"]
        load = f"PeftModel.from_pretrained({model}.from_pretrained({base!r}), {folder!r})"
    else:
        imports = ["from peft import AutoPeftModel", "from transformers import AutoProcessor"]
        load = f"AutoPeftModel.from_pretrained({folder!r})"
    return "\n".join([*imports, f"model = {load}.eval()", f"processor = AutoProcessor.from_pretrained({processor!r})"])


def model_card(result: Mapping[str, Any], base: str, snippet: str, merged: bool, client: int | None) -> str:
    """The card as Markdown with the Hub's header. `base` is the base model's id, or the name of a shipped model."""
    page = Page()
    header = {"library_name": "transformers" if merged else "peft", "pipeline_tag": "image-text-to-text"}
    if base not in SHIPPED:
        header["base_model"] = base
    page.lines += ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items())]
    page.lines += ["tags:", "- fedmllm", "- federated-learning", "---"]
    whose = f", the adapter of client {client}" if client is not None else ""
    page.heading(1, f"{result['name']}{whose}")
    page.paragraph(_origin(result, base))
    page.heading(2, "Load it")
    page.lines += ["", "```python", *snippet.splitlines(), "```"]
    page.heading(2, "How good it is")
    page.paragraph(
        "On the run's test questions, with 95 % intervals, which are about other questions of this kind and not about other "
        "data or another training." + (" Each score is the mean over the clients' models." if client is not None else "")
    )
    metrics = list(dict.fromkeys((result["primary_metric"], "accuracy")))
    rows = [
        (pattern, *(percent(values, name) if name in values else "" for name in metrics), str(values["n"]))
        for pattern, values in result["metrics"].items()
    ]
    page.table(("shown", *(f"{name}, %" for name in metrics), "questions"), rows)
    page.heading(2, "How it was trained")
    page.table(("", ""), list(_training(result).items()), left=2)
    page.heading(2, "Limits")
    page.items(_limits(result))
    page.heading(2, "Citation")
    page.lines += ["", "```bibtex", *_CITATION.splitlines(), "```"]
    return "\n".join(page.lines).lstrip("\n") + "\n"


def _origin(result: Mapping[str, Any], base: str) -> Markdown:
    kinds = {
        "federated": "clients that kept their data and sent only adapters",
        "centralised": "the pooled data of all clients",
        "zero-shot": "nothing: it is the untrained base model, for comparison",
    }
    return Markdown("`{base}`, fine-tuned with fedmllm on {how}.").filled(base=base, how=kinds[result["kind"]])


def _training(result: Mapping[str, Any]) -> dict[str, str]:
    up, down = (sum(result[key].values()) / 1e6 for key in ("bytes_up", "bytes_down"))
    spent = (result.get("privacy_spent") or {}).get("epsilon")
    return {
        "task": result["task"],
        "scenario": result["scenario"],
        "partition": result["partition"],
        "prompt": result["prompt"],
        "method": method(result),
        "adapter": result["adapter"],
        "clients": str(len(result["per_client"])),
        "rounds": str(result["rounds"]),
        "seed": str(result["seed"]),
        "sent by the clients, received by them": f"{up:.1f} MB, {down:.1f} MB",
        "privacy": f"ε = {spent:.3g} per client" if spent is not None else "no noise was added",
    }


def _limits(result: Mapping[str, Any]) -> list[str]:
    shown = ", ".join(result["metrics"])
    lines = [
        f"Tested on questions of the task {result['task']} under the patterns {shown} only; other questions were not tried.",
        "The adapter may reproduce what single training samples say"
        + (
            "."
            if not result.get("privacy_spent")
            else ", within what the stated ε allows about all samples of a client together."
        ),
        "Whatever the base model's licence and card restrict holds for this model too.",
    ]
    if result.get("attack", "none") != "none":
        lines.insert(0, f"Some of its clients attacked the training ({result['attack']}), as an experiment: do not use it.")
    return lines

"""`result.json`: what came out of a run and what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmllm.data.questions import Usual
from fedmllm.data.scenarios.aligned import aligned
from fedmllm.data.summary import modality_shares
from fedmllm.evaluation.answers import test_digest
from fedmllm.evaluation.clients import client_scores, fairness
from fedmllm.evaluation.predictions import Prediction
from fedmllm.evaluation.transfer import TransferPredictions
from fedmllm.federation import sum_groups
from fedmllm.runs.keeping import kept_rounds
from fedmllm.runs.kept import kept_by_group
from fedmllm.runs.meta import peak_memory_mb
from fedmllm.runs.rounds import Run
from fedmllm.storage.run_dir import SCHEMA
from fedmllm.tensors import Tensors, digest


@dataclass(frozen=True)
class Outcome:
    """What a run of any kind produced: the predictions of its models on the test set and on other tasks' test sets, the records
    of its rounds, the trained adapter (None if there is not one for all), one row per client, and what the suites found."""

    models: Sequence[Sequence[Prediction]]
    transferred: Sequence[TransferPredictions]
    records: Sequence[Mapping[str, Any]]
    adapter: Tensors | None
    rows: list[dict[str, Any]]
    suites: Mapping[str, Any]


def result_of(run: Run, outcome: Outcome) -> dict[str, Any]:
    """`result.json`, schema 1 (docs/runs.md)."""
    session, evaluator, records = run.session, run.evaluator, outcome.records
    config, task, manifest = session.config, session.dataset.task, session.dataset.manifest
    models = evaluator.judge(outcome.models)
    session.progress("computing the metrics", 0, 0, "")
    companion = f"+{config.task.companion.name}" if config.task.companion else ""
    metrics = evaluator.summarise(models, judged=config.judge.name != "none")
    scores = client_scores(manifest, metrics, outcome.rows, evaluator.metric)
    mechanism = session.parts.mechanism if run.kind == "federated" else None
    seen = (session.pooled.manifest, aligned()) if run.kind == "centralised" else (manifest, session.parts.scenario)
    return {
        "schema": SCHEMA,
        "name": config.name,
        "kind": run.kind,
        "task": config.task.name + companion,
        "scenario": "+".join([config.scenario.name, *(later.name for later in config.scenario.then)]),
        "partition": config.partition.name,
        "algorithm": config.algorithm.name,
        "regularization": config.regularization.name,
        "compression": config.compression.name,
        "secure": config.secure.name,
        "robust": config.robust.name,
        "privacy": config.privacy.name,
        "attack": config.attack.name,
        "asynchronous": config.asynchronous.name,
        "privacy_spent": mechanism.to_json(len(records)) if mechanism else None,
        "prompt": config.prompt.name,
        "model": config.model.name,
        "adapter": config.model.adapter.kind,
        "seed": config.seed,
        "draw": config.task.draw,
        "primary_metric": evaluator.metric,
        "positive": task.positive,
        "asks": Usual.of(session.dataset.test).to_json(),
        "match": config.eval.match,
        "judge": config.judge.name,
        "metrics": metrics,
        "bootstrap_scores": evaluator.bootstrap_scores(models),
        "test_digest": test_digest(models[0]),
        "transfer": evaluator.transfer_summary(outcome.transferred),
        "suites": outcome.suites,
        "per_client": outcome.rows,
        "clients": fairness(scores),
        "modalities": modality_shares(seen[0], session.dataset.train, seen[1]),
        "kept": kept_by_group(records, outcome.rows),
        "rounds": len(records),
        "keep": config.train.keep,
        "kept_rounds": [] if run.kind == "local" else kept_rounds(config.train, records, evaluator.score),
        "stopped_early": bool(records and records[-1].get("stopped")),
        "cohort": session.model.limits.clients.size(run.cohort),
        "bytes_up": _total(records, "bytes_up"),
        "bytes_down": _total(records, "bytes_down"),
        "bytes_by_part": {"up": _total(records, "parts_up"), "down": _total(records, "parts_down")},
        "adapter_parameters": session.model.adapter.sizes,
        "seconds": {
            "total": round(time.monotonic() - run.began + session.seconds, 2),
            "train": round(sum(float(record["seconds"]) for record in records), 2),
            "eval": round(evaluator.seconds, 2),
            "setup": round(session.seconds + run.prepare_seconds, 2),
        },
        "simulated_seconds": simulated_seconds(records),
        "peak_memory_mb": peak_memory_mb(),
        "config_digest": config.digest(),
        "manifest_digest": manifest.digest(),
        "adapter_sha256": digest(outcome.adapter) if outcome.adapter is not None else None,
        "skipped_samples": session.skipped,
        "refused_updates": sum(len(record["refused"]) for record in records),
    }


def simulated_seconds(records: Sequence[Mapping[str, Any]]) -> float | None:
    """When the last round ended on the virtual clock; None without one."""
    clock = records[-1].get("clock") if records else None
    return float(clock["began"] + clock["seconds"]) if clock else None


def _total(records: Iterable[Mapping[str, Any]], key: str) -> dict[str, int]:
    """The bytes of all rounds, by group or part; a run that an earlier version began has no parts in its first records."""
    return sum_groups(record.get(key, {}) for record in records)

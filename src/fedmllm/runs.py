"""Do a run of one kind from start to `result.json`, or go on with one that was cut short.

All kinds share one loop: zero-shot trains nothing, local is a federation of one client for each client, centralised a
federation of one client that holds everything.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedmllm.algorithms import Algorithm
from fedmllm.algorithms.factors import fold_of, resized
from fedmllm.algorithms.fedavg import fedavg
from fedmllm.bench import Bench, client_rows, gaps, rounds_alone
from fedmllm.config import Experiment, RunKind
from fedmllm.errors import ConfigError, RunError
from fedmllm.evaluation.clients import client_scores, fairness
from fedmllm.evaluation.evaluate import Prediction, primary_metric, summarise
from fedmllm.evaluation.judging import Panel, judges
from fedmllm.evaluation.transfer import Answers
from fedmllm.experiment import Data, Report, build_algorithm, build_secure, default_stem, silent
from fedmllm.federation import Fleet, Plan, each_alone, federate, participants
from fedmllm.fleets import fleets
from fedmllm.fleets.base import Carrier, FleetKind, Site
from fedmllm.models.mllm import Encoded
from fedmllm.provenance import describe, peak_memory_mb
from fedmllm.rng import stream
from fedmllm.store import SCHEMA, RunDir, new_run, unfinished
from fedmllm.tensors import State, Tensors, digest, flatten
from fedmllm.training.capacity import cohort_size


def choose(config: Experiment, kind: RunKind, out: Path | None, resume: bool) -> RunDir:
    """The directory to run in: `out`, else a new one in runs/; with `resume` that of the latest run which is not complete.

    Raises RunError where `out` holds something else, or a run that was not asked to go on.
    """
    if out is None:
        stem = default_stem(config, kind)
        found = unfinished(Path("runs"), stem, config.digest()) if resume else None
        return found or new_run(Path("runs"), stem)
    run = RunDir(out)
    if resume and run.complete:
        known = run.result()
        if known["config_digest"] != config.digest() or known["kind"] != kind:
            raise RunError(f"{out} holds another experiment's run; give another --out.")
        return run
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is not empty; give another --out, or --resume to go on with the run in it.")
    return run


def _refuse_in_the_clear(config: Experiment, kind: FleetKind) -> None:
    """Raises ConfigError where updates are to be hidden and the fleet would send them as they are."""
    if config.secure.name != "none" and not (kind.here or kind.secure):
        raise ConfigError(
            f"fleet.name: {config.fleet.name!r} does not carry secure.name = {config.secure.name!r} yet; "
            'set fleet.name = "in-process" or secure.name = "none".'
        )


class Runner:
    """One run of one kind in one directory."""

    def __init__(
        self,
        config: Experiment,
        data: Data,
        bench: Bench,
        run: RunDir,
        kind: RunKind,
        report: Report = silent,
        elsewhere: FleetKind | None = None,
    ) -> None:
        """`elsewhere` is the fleet that trains a federation's clients, in place of the one that the experiment names."""
        self.config, self.data, self.bench, self.run, self.kind, self.report = config, data, bench, run, kind, report
        named = fleets.build(config.fleet.name, config.fleet.options)
        if kind == "federated":
            _refuse_in_the_clear(config, elsewhere or named)
        # What a federation is compared with is trained here, wherever its clients are.
        self._fleets = (elsewhere or named) if kind == "federated" else fleets.build("in-process", {})
        self._began = time.monotonic()
        self._eval_seconds = self._prepare_seconds = 0.0
        self._cohort = 1

    def start(self) -> None:
        """Write what is known beforehand. Raises RunError where the directory holds another experiment's run."""
        if self.run.exists:
            meta = self.run.meta()
            if meta.get("config_digest") != self.config.digest() or meta.get("kind") != self.kind:
                raise RunError(f"{self.run.path} holds another experiment's run; give another --out.")
            if meta.get("manifest_digest") != self.data.manifest.digest():
                raise RunError(f"{self.run.path}: the data changed since this run began; start a new one with another --out.")
            return
        self.data.manifest.write(self.run.manifest)
        self.run.begin(self.config.toml(), describe(self.config, self.kind, self.data, self.bench))

    def execute(self) -> dict[str, Any]:
        """Do the run, or what is left of it, and return its result."""
        self._prepare()
        work = {
            "federated": self._federated, "zero-shot": self._zero_shot, "local": self._local, "centralised": self._centralised
        }  # fmt: skip
        with self.run.claimed():
            self.start()
            result = work[self.kind]()
            self.run.finish(result)
        return result

    def _prepare(self) -> None:
        """Encode what the run will train on, before anything is written."""
        began, bench = time.monotonic(), self.bench
        bench.transfer  # noqa: B018 (read and encoded now)
        if not self._fleets.here:
            bench.prepare(bench.clients, [])
        elif self.kind in ("federated", "local"):
            federated = self.kind == "federated"
            clients = participants(self._plan) if federated else self._tested(range(self.data.manifest.clients))
            bench.prepare(bench.clients, clients)
            most = self.config.train.clients_per_round if federated else len(clients)
            held = (one for client in clients for one in bench.clients[client])
            self._cohort = cohort_size(bench.model, held, self.config.train, most)
        elif self.kind == "centralised":
            bench.prepare(bench.pooled, [0])
        else:
            bench.prepare(bench.clients, [])
        self._prepare_seconds = time.monotonic() - began

    # The kinds

    def _zero_shot(self) -> dict[str, Any]:
        with self.bench.model.without_adapter():
            predictions = self._examine({"adapter": self.bench.initial})
            carried = self._carried([{"adapter": self.bench.initial}])
        self.run.save_predictions(p.to_json() for p in predictions)
        return self._result([predictions], carried, [], None, client_rows(self.data.manifest))

    def _federated(self) -> dict[str, Any]:
        algorithm, plan = build_algorithm(self.config), self._plan
        state, records = self._train(algorithm, self.bench.clients, plan, "rounds")
        rows, took_part = client_rows(self.data.manifest), Counter(c for record in records for c in record["sampled"])
        sites = self.config.fleet.options.get("sites")
        for row in rows:
            row["rounds"] = took_part[row["client"]]
            row |= {"rank": plan.ranks[row["client"]]} if plan.ranks else {}
            row |= {"site": sites[row["client"]]} if sites else {}
        if self._fleets.evaluate is not None:
            self.report("asking the sites", 0, 0, "each tests on data of its own")
            info = plan.info(plan.rounds, plan.clients)
            messages = {client: algorithm.message(state, client, info) for client in plan.clients}
            for client, found in self._fleets.evaluate(messages, plan.rounds).items():
                rows[client] |= found
        if algorithm.personal:
            return self._conclude_personal(algorithm, state, plan, records, rows)
        return self._conclude(state, records, rows)

    def _centralised(self) -> dict[str, Any]:
        clients = self.bench.pooled
        plan = replace(Plan.of(self.config.train, [0], self.config.seed), rounds=rounds_alone(self.config))
        state, records = self._train(fedavg(), clients, plan, "epochs over the pooled data")
        return self._conclude(state, records, client_rows(clients.manifest))

    def _local(self) -> dict[str, Any]:
        rows, everyone, carried, records = client_rows(self.data.manifest), [], list[Answers](), []
        chosen = self._tested(range(len(rows)))
        tested = [rows[client] for client in chosen]
        for start in range(0, len(chosen), self._cohort):
            self._train_alone([c for c in chosen[start : start + self._cohort] if self.run.load_part(f"client-{c}") is None])
            for number, row in enumerate(tested[start : start + self._cohort], start=start + 1):
                part = self.run.load_part(f"client-{row['client']}")
                assert part is not None
                predictions = [Prediction(**p) for p in part["predictions"]]
                row["metrics"] = self._summarise([predictions])
                everyone.append(predictions)
                carried.append({name: [Prediction(**p) for p in found] for name, found in part.get("transfer", {}).items()})
                records += part["rounds"]
                metric = primary_metric(self.data.task)
                score = row["metrics"][self.config.eval.patterns[0]][metric]
                self.report("clients alone", number, len(tested), f"client {row['client']}: {metric} {100 * score:.1f} %")
        self._save_each(tested, everyone)
        # Nothing travels when clients train alone.
        silent_records = [{**record, "bytes_up": {}, "bytes_down": {}} for record in records]
        return self._result(everyone, carried, silent_records, None, rows)

    def _train_alone(self, clients: Sequence[int]) -> None:
        """Train each of these clients on its own data only, test it and keep what came of it as a part of the run."""
        if not clients:
            return
        config, bench = self.config, self.bench
        plan = replace(Plan.of(config.train, clients, config.seed), rounds=rounds_alone(config))
        adapters = dict.fromkeys(clients, bench.initial)
        if config.clients.rank:
            adapters = {c: resized(bench.initial, config.rank_of(c), bench.model.info) for c in clients}
        done: dict[int, list[dict[str, Any]]] = {client: [] for client in clients}
        states: dict[int, State] = {}
        for made in each_alone(fedavg(), self._fleet(fedavg(), bench.clients), plan, adapters):
            for client, (record, state) in made.items():
                done[client].append(asdict(record))
                states[client] = state
        ended = [states[client] for client in clients]
        for client, mine, others in zip(clients, self._examine_each(ended), self._carried(ended), strict=True):
            transfer = {name: [p.to_json() for p in found] for name, found in others.items()}
            part = {"predictions": [p.to_json() for p in mine], "transfer": transfer, "rounds": done[client]}
            self.run.save_part(f"client-{client}", part)

    # Their common steps

    @cached_property
    def _plan(self) -> Plan:
        """The federation's rounds over all clients."""
        config, clients = self.config, range(self.data.manifest.clients)
        ranks = {client: config.rank_of(client) for client in clients} if config.clients.rank else {}
        return Plan.of(config.train, clients, config.seed, self.bench.model.info, ranks)

    @cached_property
    def _gaps(self) -> dict[int, float]:
        return dict(enumerate(gaps(self.data.manifest)))

    def _fleet(self, algorithm: Algorithm, clients: Mapping[int, Sequence[Encoded]]) -> Fleet:
        bench, train, memory = self.bench, self.config.train, self.run.checkpoint / "clients"
        site = Site(bench.model, algorithm, clients, train, bench.initial, self._gaps, memory, self._cohort)
        run = self.run.meta().get("run_id", self.config.digest())
        if not self._fleets.here:
            site = replace(site, run=run, config=self.config.toml(), last=self._last_rounds())
        fleet, secure = self._fleets.make(site), build_secure(self.config) if self.kind == "federated" else None
        if secure is None:
            return fleet
        from fedmllm.secure.fleet import LocalCarrier, SecureFleet  # the only use of libraries that may not be there

        carrier = LocalCarrier(secure, algorithm, fleet, run) if self._fleets.here else fleet
        assert isinstance(carrier, Carrier), "FleetKind.secure says so"
        return SecureFleet(secure, algorithm, fleet, carrier, run)

    def _last_rounds(self) -> dict[int, int]:
        """client -> the last round, of those that the checkpoint has, in which its update was used."""
        resume = self.run.load_checkpoint()
        last: dict[int, int] = {}
        for record in self.run.rounds()[: resume[0] if resume else 0]:
            refused = {refusal["client"] for refusal in record["refused"]}
            last |= {client: record["round"] for client in record["sampled"] if client not in refused}
        return last

    def _train(
        self, algorithm: Algorithm, clients: Mapping[int, Sequence[Encoded]], plan: Plan, stage: str
    ) -> tuple[State, list[dict[str, Any]]]:
        """The server's final state and all rounds' records, going on from the checkpoint where there is one."""
        resume = self.run.load_checkpoint()
        state = resume[1] if resume else {"adapter": self.bench.initial}
        if resume:
            self.report(stage, resume[0], plan.rounds, "resumed")
        every, fleet = self.config.eval.every, self._fleet(algorithm, clients)
        for record, state in federate(algorithm, fleet, plan, self.bench.initial, resume):
            done, note = record.round + 1, f"loss {record.loss:.3f}"
            if every and done % every == 0 and done < plan.rounds:
                models = self._own_models(algorithm, state, plan, fleet, done) if algorithm.personal else {0: state}
                record = replace(record, metrics=self._summarise(self._examine_each(list(models.values()))))
                metric = primary_metric(self.data.task)
                note += f"  {metric} {100 * record.metrics[self.config.eval.patterns[0]][metric]:.1f} %"  # type: ignore[operator]
            self.run.save_round(asdict(record), state, self.config.digest())
            if record.refused:
                note += f"  {len(record.refused)} updates refused"
            self.report(stage, done, plan.rounds, note)
        return state, self.run.rounds()

    def _tested(self, clients: Sequence[int]) -> list[int]:
        """The clients whose own models are tested: all, or a draw of `eval.clients` of them."""
        count = min(self.config.eval.clients or len(clients), len(clients))
        drawn = stream(self.config.seed, "tested clients").choice(len(clients), size=count, replace=False)
        return sorted(clients[int(i)] for i in drawn)

    def _own_models(self, algorithm: Algorithm, state: State, plan: Plan, fleet: Fleet, done: int) -> dict[int, State]:
        """client -> its own adapter, for all clients or as many as `eval.clients` says."""
        chosen = self._tested(plan.clients)
        info = plan.info(done, chosen)
        return {c: {"adapter": fleet.personal(c, algorithm.message(state, c, info), done)} for c in chosen}

    def _conclude(self, state: State, records: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
        predictions = self._examine(state)
        self.run.save_predictions(p.to_json() for p in predictions)
        carried = self._carried([state])
        self.bench.model.adapter.export(self.run.adapter, self.config.model.name)
        fold = fold_of(state)
        made = flatten({"adapter": state["adapter"], "fold": fold}) if fold else state["adapter"]
        return self._result([predictions], carried, records, made, rows)

    def _conclude_personal(
        self, algorithm: Algorithm, state: State, plan: Plan, records: list[dict[str, Any]], rows: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Every client is tested with its own model and its adapter exported; the figures are the clients' mean."""
        fleet = self._fleet(algorithm, self.bench.clients)
        models = self._own_models(algorithm, state, plan, fleet, plan.rounds)
        tested = [rows[client] for client in sorted(models)]
        everyone = self._examine_each([models[row["client"]] for row in tested])
        carried = self._carried([models[row["client"]] for row in tested])
        for number, (row, predictions) in enumerate(zip(tested, everyone, strict=True), start=1):
            client = row["client"]
            row["metrics"] = self._summarise([predictions])
            self.bench.model.adapter.set(models[client]["adapter"])
            self.bench.model.adapter.export(self.run.adapters / f"client-{client}", self.config.model.name)
            self.report("clients' own models", number, len(tested), f"client {client}")
        self._save_each(tested, everyone)
        made = flatten({f"client-{client}": model["adapter"] for client, model in models.items()})
        return self._result(everyone, carried, records, made, rows)

    def _save_each(self, rows: Sequence[Mapping[str, Any]], everyone: Sequence[Sequence[Prediction]]) -> None:
        lines = ({"client": row["client"], **p.to_json()} for row, m in zip(rows, everyone, strict=True) for p in m)
        self.run.save_predictions(lines)

    def _summarise(self, models: Sequence[Sequence[Prediction]], judged: bool = False) -> dict[str, dict[str, Any]]:
        return summarise(self.data.task, models, self.config.seed, self.config.eval.bootstrap, judged)

    def _judged(self, models: Sequence[Sequence[Prediction]]) -> Sequence[Sequence[Prediction]]:
        """The predictions with a judge's verdicts on the open ones, where the experiment names a judge."""
        judge = judges.build(self.config.judge.name, self.config.judge.options)
        if judge is None:
            return models
        self.report("asking the judge", 0, 0, self.config.judge.name)
        panel, questions = Panel(judge), {s.id: s.question for s in self.data.test}
        judged = [panel.judge(model, questions) for model in models]
        self.run.save_judgements(panel.judgements())
        return judged

    def _examine(self, state: State) -> list[Prediction]:
        return self._examine_each([state])[0]

    @contextmanager
    def _asking(self, states: Sequence[State]) -> Iterator[list[Tensors]]:
        """The adapters of several models, which all have the first one's fold; what is asked of them counts as evaluation."""
        began = time.monotonic()
        self.bench.model.adapter.set_fold(fold_of(states[0]))
        yield [state["adapter"] for state in states]
        self._eval_seconds += time.monotonic() - began

    def _examine_each(self, states: Sequence[State]) -> list[list[Prediction]]:
        """The predictions of several models."""
        with self._asking(states) as adapters:
            return list(self.bench.examination.take_each(self.config.eval, adapters))

    def _carried(self, states: Sequence[State]) -> list[Answers]:
        """Their answers to the other tasks' questions."""
        with self._asking(states) as adapters:
            return self.bench.transfer.take_each(adapters)

    def _result(
        self,
        models: Sequence[Sequence[Prediction]],
        carried: Sequence[Answers],
        records: Sequence[Mapping[str, Any]],
        adapter: Tensors | None,
        rows: list[dict[str, Any]],
    ) -> dict[str, Any]:
        config, task = self.config, self.data.task
        models = self._judged(models)
        companion = f"+{config.task.companion.name}" if config.task.companion else ""
        train_seconds = sum(float(record["seconds"]) for record in records)
        metrics = self._summarise(models, judged=config.judge.name != "none")
        scores = client_scores(self.data.manifest, metrics, rows, primary_metric(task))
        return {
            "schema": SCHEMA,
            "name": config.name,
            "kind": self.kind,
            "task": config.task.name + companion,
            "scenario": config.scenario.name,
            "partition": config.partition.name,
            "algorithm": config.algorithm.name,
            "regularization": config.regularization.name,
            "compression": config.compression.name,
            "secure": config.secure.name,
            "prompt": config.prompt.name,
            "model": config.model.name,
            "adapter": config.model.adapter.kind,
            "seed": config.seed,
            "primary_metric": primary_metric(task),
            "positive": task.positive,
            "judge": config.judge.name,
            "metrics": metrics,
            "transfer": self.bench.transfer.summary(carried, config.seed),
            "per_client": rows,
            "clients": fairness(scores),
            "rounds": len(records),
            "cohort": self._cohort,
            "bytes_up": _sum_groups(records, "bytes_up"),
            "bytes_down": _sum_groups(records, "bytes_down"),
            "seconds": {
                "total": round(time.monotonic() - self._began + self.bench.seconds, 2),
                "train": round(train_seconds, 2),
                "eval": round(self._eval_seconds, 2),
                "setup": round(self.bench.seconds + self._prepare_seconds, 2),
            },
            "peak_memory_mb": peak_memory_mb(),
            "config_digest": config.digest(),
            "manifest_digest": self.data.manifest.digest(),
            "adapter_sha256": digest(adapter) if adapter is not None else None,
            "skipped_samples": self.data.skipped,
            "refused_updates": sum(len(record["refused"]) for record in records),
        }


def _sum_groups(records: Sequence[Mapping[str, Any]], key: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for record in records:
        for group, count in record[key].items():
            total[group] = total.get(group, 0) + count
    return total

"""The kinds of runs: federated, and the baselines zero-shot, local and centralised.

All share one round loop: local is a federation of one client for each client, centralised a federation of one client that
holds everything, and zero-shot trains nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from fedmllm.algorithms import Algorithm
from fedmllm.algorithms.factors import fold_of, resized
from fedmllm.algorithms.fedavg import fedavg
from fedmllm.data.summary import client_rows
from fedmllm.evaluation.predictions import Prediction
from fedmllm.evaluation.transfer import TransferPredictions
from fedmllm.federation import FederationPlan, each_alone
from fedmllm.fleets.base import FleetBackend
from fedmllm.fleets.inprocess import IN_PROCESS
from fedmllm.kinds import RunKind
from fedmllm.progress import DETAIL
from fedmllm.runs.hints import of_result
from fedmllm.runs.result import Outcome, result_of
from fedmllm.runs.rounds import (
    Run,
    begin,
    federation_plan,
    open_fleet,
    personal_models,
    prepare_run,
    show_notes,
    solo_rounds,
    train_rounds,
)
from fedmllm.runs.session import Session
from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import State, flatten


def execute(kind: RunKind, session: Session, directory: RunDir, backend: FleetBackend = IN_PROCESS) -> dict[str, Any]:
    """Do a run from start to `result.json`, or what is left of one that was interrupted; the result.

    `backend` is where the clients of a federation train; baselines always train in this process. Raises ConfigError or
    DataError before anything is written, RunError if the directory holds another experiment's run.
    """
    run = prepare_run(kind, session, directory, backend)
    with directory.claimed():
        begin(run)
        with session.progress.kept_in(directory.log):
            with run.tracking.following(directory):
                result = result_of(run, KINDS[kind](run))
                directory.finish(result)
                run.tracking.end(result)
            for hint in of_result(result):
                session.progress("note", 0, 0, hint)
            session.progress(DETAIL, 0, 0, f"complete after {result['seconds']['total']} s")
    return result


def zero_shot(run: Run) -> Outcome:
    """The untrained model."""
    states: list[State] = [{"adapter": run.session.initial}]
    with run.session.model.without_adapter():
        models, transferred = run.evaluator.predict(states), run.evaluator.transfer(states)
        suites = run.evaluator.examine(states)
    run.directory.save_predictions(prediction.to_json() for prediction in models[0])
    return Outcome(models, transferred, [], None, client_rows(run.session.dataset.manifest), suites)


def federated(run: Run) -> Outcome:
    """The federation itself, on the fleet of the run's backend."""
    session, algorithm, plan = run.session, run.session.parts.algorithm, federation_plan(run.session)
    state, records = train_rounds(run, algorithm, session.clients, plan, "rounds")
    rows = client_rows(session.dataset.manifest)
    rounds = Counter(client for record in records for client in record["sampled"])
    sites = session.config.fleet.options.get("sites")
    for row in rows:
        row["rounds"] = rounds[row["client"]]
        row |= {"rank": plan.ranks[row["client"]]} if plan.ranks else {}
        row |= {"site": sites[row["client"]]} if sites else {}
        row |= {"attacker": True} if row["client"] in session.attackers else {}
        row |= {"eligible": False} if row["client"] in session.excluded else {}
    if run.backend.evaluate is not None:
        session.progress("asking the sites", 0, 0, "each tests on data of its own")
        info = plan.info(len(records), plan.clients)
        messages = {client: algorithm.message(state, client, info) for client in plan.clients}
        for client, figures in run.backend.evaluate(messages, len(records)).items():
            rows[client] |= figures
    if algorithm.personal:
        return _conclude_personal(run, algorithm, state, plan, records, rows)
    return _conclude(run, state, records, rows)


def centralised(run: Run) -> Outcome:
    """All data pooled on one client."""
    session = run.session
    plan = replace(FederationPlan.of(session.config.train, [0], session.config.seed), rounds=solo_rounds(session))
    state, records = train_rounds(run, fedavg(), session.pooled, plan, "epochs over the pooled data")
    return _conclude(run, state, records, client_rows(session.pooled.manifest))


def local(run: Run) -> Outcome:
    """Every client trains alone; the figures are the clients' mean."""
    evaluator, directory = run.evaluator, run.directory
    rows, models, transferred, records = client_rows(run.session.dataset.manifest), [], list[TransferPredictions](), []
    clients = evaluator.sample_clients(range(len(rows)))
    tested = [rows[client] for client in clients]
    for start in range(0, len(clients), run.cohort):
        cohort = clients[start : start + run.cohort]
        train_alone(run, [client for client in cohort if directory.load_part(f"client-{client}") is None])
        show_notes(run)
        for number, row in enumerate(tested[start : start + run.cohort], start=start + 1):
            part = directory.load_part(f"client-{row['client']}")
            assert part is not None
            predictions = [Prediction(**p) for p in part["predictions"]]
            row["metrics"] = evaluator.summarise([predictions])
            models.append(predictions)
            transferred.append({task: [Prediction(**p) for p in ps] for task, ps in part.get("transfer", {}).items()})
            records += part["rounds"]
            score = f"{evaluator.metric} {100 * evaluator.score(row['metrics']):.1f} %"
            run.session.progress("clients alone", number, len(tested), f"client {row['client']}: {score}")
    _save_client_predictions(run, tested, models)
    # Nothing is sent if clients train alone.
    unsent = [{**record, "bytes_up": {}, "bytes_down": {}, "parts_up": {}, "parts_down": {}} for record in records]
    return Outcome(models, transferred, unsent, None, rows, evaluator.examine([]))


def train_alone(run: Run, clients: Sequence[int]) -> None:
    """Train each of these clients on its own data only, test it, and save the outcome as a part of the run."""
    if not clients:
        return
    session, config = run.session, run.session.config
    plan = replace(FederationPlan.of(config.train, clients, config.seed), rounds=solo_rounds(session))
    adapters = dict.fromkeys(clients, session.initial)
    if config.clients.rank:
        adapters = {c: resized(session.initial, config.rank_of(c), session.model.info) for c in clients}
    records: dict[int, list[dict[str, Any]]] = {client: [] for client in clients}
    states: dict[int, State] = {}
    for by_client in each_alone(fedavg(), open_fleet(run, fedavg(), session.clients), plan, adapters):
        for client, (record, state) in by_client.items():
            records[client].append(asdict(record))
            states[client] = state
    final = [states[client] for client in clients]
    predicted, transferred = run.evaluator.predict(final), run.evaluator.transfer(final)
    for client, predictions, by_task in zip(clients, predicted, transferred, strict=True):
        transfer = {task: [p.to_json() for p in answers] for task, answers in by_task.items()}
        part = {"predictions": [p.to_json() for p in predictions], "transfer": transfer, "rounds": records[client]}
        run.directory.save_part(f"client-{client}", part)


def _conclude(run: Run, state: State, records: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Outcome:
    """Test and export one model for all."""
    models = run.evaluator.predict([state])
    run.directory.save_predictions(prediction.to_json() for prediction in models[0])
    transferred, suites = run.evaluator.transfer([state]), run.evaluator.examine([state])
    run.session.model.adapter.export(run.directory.adapter, run.session.config.model.name)
    fold = fold_of(state)
    adapter = flatten({"adapter": state["adapter"], "fold": fold}) if fold else state["adapter"]
    return Outcome(models, transferred, records, adapter, rows, suites)


def _conclude_personal(
    run: Run,
    algorithm: Algorithm,
    state: State,
    plan: FederationPlan,
    records: list[dict[str, Any]],
    rows: list[dict[str, Any]],
) -> Outcome:
    """Test and export every client's own model; the figures are the clients' mean."""
    session, evaluator = run.session, run.evaluator
    fleet = open_fleet(run, algorithm, session.clients)
    states = personal_models(run, algorithm, state, plan, fleet, len(records))
    tested = [rows[client] for client in sorted(states)]
    ordered = [states[row["client"]] for row in tested]
    models, transferred = evaluator.predict(ordered), evaluator.transfer(ordered)
    suites = evaluator.examine(ordered, sorted(states))
    for number, (row, predictions) in enumerate(zip(tested, models, strict=True), start=1):
        client = row["client"]
        row["metrics"] = evaluator.summarise([predictions])
        session.model.adapter.set_fold(fold_of(states[client]))
        session.model.adapter.set(states[client]["adapter"])
        session.model.adapter.export(run.directory.adapters / f"client-{client}", session.config.model.name)
        session.progress("clients' own models", number, len(tested), f"client {client}")
    _save_client_predictions(run, tested, models)
    adapter = flatten({f"client-{client}": personal["adapter"] for client, personal in states.items()})
    return Outcome(models, transferred, records, adapter, rows, suites)


def _save_client_predictions(run: Run, rows: Sequence[Mapping[str, Any]], models: Sequence[Sequence[Prediction]]) -> None:
    run.directory.save_predictions(
        {"client": row["client"], **p.to_json()} for row, model in zip(rows, models, strict=True) for p in model
    )


KINDS: dict[RunKind, Callable[[Run], Outcome]] = {
    "federated": federated, "zero-shot": zero_shot, "local": local, "centralised": centralised
}  # fmt: skip

"""The steps that all kinds of runs share: plan the rounds, open a fleet, train round by round, save each round."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fedmllm.algorithms import Algorithm
from fedmllm.attacks.fleet import AttackedFleet
from fedmllm.config import Experiment
from fedmllm.errors import ConfigError, RunError, brief
from fedmllm.federation import FederationPlan, Fleet, federate, participants
from fedmllm.fleets.base import FleetBackend, FleetContext
from fedmllm.fleets.inprocess import IN_PROCESS
from fedmllm.kinds import RunKind
from fedmllm.privacy.user_level import NoisyMean
from fedmllm.progress import DETAIL
from fedmllm.runs.client_data import ClientData
from fedmllm.runs.directory import another_run
from fedmllm.runs.evaluator import Evaluator
from fedmllm.runs.hints import of_federation
from fedmllm.runs.keeping import Keeping, scores_of
from fedmllm.runs.meta import describe
from fedmllm.runs.session import Session
from fedmllm.runs.tracking import Tracking, live, untracked
from fedmllm.simulation.clock import Simulation
from fedmllm.simulation.selection import policy_of
from fedmllm.storage.run_dir import RunDir
from fedmllm.tensors import State, problem_with
from fedmllm.training.capacity import cohort_size


@dataclass
class Run:
    """One run of one kind in one directory. `cohort` is the number of clients that train in one pass; `prepare_seconds` the
    time that encoding took."""

    kind: RunKind
    session: Session
    directory: RunDir
    backend: FleetBackend
    evaluator: Evaluator
    cohort: int = 1
    prepare_seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)
    tracking: Tracking = field(default_factory=untracked)


def federation_plan(session: Session) -> FederationPlan:
    """The rounds of the federation over all clients that have the memory for it."""
    everyone, config, excluded = range(session.dataset.manifest.clients), session.config, session.excluded
    clients = [client for client in everyone if client not in excluded] if excluded else everyone
    plan = FederationPlan.of(config.train, clients, config.seed, session.model.info, session.parts.ranks)
    sizes = session.dataset.manifest.sizes()
    simulation = Simulation.of(config, sizes, sorted(excluded))
    policy = policy_of(config.train, simulation, sizes, sorted(excluded))
    plan = replace(plan, remedy=smaller_steps(config), simulation=simulation, policy=policy)
    plan = replace(plan, over_select=config.train.over_select, asynchronous=session.parts.asynchronous)
    if (mechanism := session.parts.mechanism) is not None:
        # Whether an update counts must not depend on the others, nor a round's end on how many clients take part.
        private = replace(plan, rounds=mechanism.rounds, poisson=True, min_updates=0, max_norm_ratio=0.0)
        return replace(private, combine=NoisyMean(mechanism, config.seed))
    if (robust := session.parts.robust) is not None:
        plan = replace(plan, combine=robust.combine)
    if session.parts.secure is not None:  # every update is a copy of the mean, and counts are shared out evenly
        return replace(plan, max_norm_ratio=0.0)
    tables = [config.train_of(client) for client in everyone]
    declared = [table.epochs * size for table, size in zip(tables, sizes, strict=True)]
    return replace(plan, declared=declared, per_step=[table.batch_size * table.accumulate for table in tables])


def smaller_steps(config: Experiment) -> str:
    """Which settings make the server's step smaller, with their values: "lower algorithm.server_lr = 10.0 or …"."""
    options = {f"algorithm.{name}": value for name, value in config.algorithm.options.items()}
    lower = [key for key in ("algorithm.server_lr", "algorithm.momentum") if key in options]
    raised = [key for key in ("algorithm.tau", "algorithm.a") if key in options]
    values = {**options, "train.lr": config.train.lr}
    advice = "lower " + " or ".join(f"{key} = {values[key]}" for key in (*lower, "train.lr"))
    return advice + "".join(f", or raise {key} = {values[key]}" for key in raised)


def solo_rounds(session: Session) -> int:
    """Rounds of a client that trains alone: as many as it would take part in, on average, in the federation."""
    train = session.config.train
    return max(1, round(train.rounds * train.clients_per_round / session.config.partition.clients))


def check_secure_backend(session: Session, backend: FleetBackend) -> None:
    """Raises ConfigError if updates must be hidden and the fleet would send them in the clear."""
    config = session.config
    if session.parts.secure is not None and not (backend.local or backend.secure):
        raise ConfigError(
            f"fleet.name: {config.fleet.name!r} does not support secure.name = {config.secure.name!r} yet; "
            'set fleet.name = "in-process" or secure.name = "none".'
        )


def check_attackers(session: Session, plan: FederationPlan) -> list[int]:
    """The attackers that take part while they attack. Raises ConfigError if there is none."""
    attack = session.parts.attack
    start = attack.start if attack else 0
    active = session.attackers.intersection(participants(plan, start))
    if not active:
        clients = session.config.partition.clients
        raise ConfigError(
            f"attack.share: {len(session.attackers)} of {clients} clients would attack, and none of them is sampled "
            f"in a round from attack.start = {start} on; raise attack.share, train.clients_per_round or train.rounds, "
            "or choose another seed."
        )
    return sorted(active)


def prepare_run(kind: RunKind, session: Session, directory: RunDir, backend: FleetBackend = IN_PROCESS) -> Run:
    """Encode what a run trains and tests on, before anything is written. Raises ConfigError or DataError.

    `backend` is where the clients of a federation train; baselines always train in this process.
    """
    attackers: list[int] = []
    plan: FederationPlan | None = None
    train = session.config.train
    if kind == "local" and (train.keep != "last" or train.patience is not None):
        raise ConfigError(
            "train.keep and train.patience go by the rounds of one model, and clients that train alone are tested at the end "
            'only; for this baseline, set train.keep = "last" and leave out train.mean_of and train.patience.'
        )
    if kind == "federated":
        check_secure_backend(session, backend)
        plan = federation_plan(session)
        for hint in of_federation(session, plan):
            session.progress("note", 0, 0, hint)
        if session.parts.attack is not None:
            attackers = check_attackers(session, plan)
        if (mechanism := session.parts.mechanism) is not None:
            session.progress("privacy", 0, 0, mechanism.summary())
            if mechanism.rounds < session.config.train.rounds:
                spent = f"the budget ends after {mechanism.rounds} of {session.config.train.rounds} rounds, and so does the run"
                session.progress("note", 0, 0, spent)
    run = Run(kind, session, directory, backend if kind == "federated" else IN_PROCESS, Evaluator(session, directory))
    run.tracking = live(session.config.track, directory, session.progress)
    began = time.monotonic()
    session.transfer  # noqa: B018 (read and encoded now)
    if run.kind == "centralised":
        session.prepare(session.pooled, [0])
    elif run.kind == "zero-shot" or not run.backend.local:
        session.prepare(session.clients, [])
    else:
        everyone = range(session.dataset.manifest.clients)
        clients = participants(plan) if plan is not None else run.evaluator.sample_clients(everyone)
        session.prepare(session.clients, clients)
        if attackers:
            session.prepare(session.attacked, attackers)
        most = session.config.train.clients_per_round if plan is not None else len(clients)
        samples = (sample for client in clients for sample in session.clients[client])
        session.progress("choosing how many clients train in one pass", 0, 0, "")
        run.cohort = cohort_size(session.model, samples, session.config.largest_batches(clients), most)
    run.prepare_seconds = time.monotonic() - began
    return run


def begin(run: Run) -> None:
    """Write what is known beforehand. Raises RunError if the directory holds another experiment's run."""
    show_notes(run)
    run.session.progress(DETAIL, 0, 0, f"the files of the run are in {run.directory.path}")
    if run.kind != "zero-shot" and run.backend.local:
        run.session.progress(DETAIL, 0, 0, f"up to {run.cohort} clients train in one pass")
    directory, config, dataset = run.directory, run.session.config, run.session.dataset
    if directory.exists:
        meta = directory.meta()
        if meta.get("config_digest") != config.digest() or meta.get("kind") != run.kind:
            raise another_run(directory, config, meta.get("kind") == run.kind)
        content = meta.get("content_digest")  # runs of earlier versions have none
        if meta.get("manifest_digest") != dataset.manifest.digest() or content not in (None, dataset.content_digest()):
            raise RunError(f"{directory.path}: the data changed since this run began; start a new one with another --out.")
        return
    dataset.manifest.write(directory.manifest)
    directory.begin(config.toml(), describe(run.session, run.kind))


def show_notes(run: Run) -> None:
    """Tell the user what the directory found damaged since the last call."""
    notes, run.directory.notes = run.directory.notes, []
    for note in notes:
        run.session.progress("note", 0, 0, note)


def open_fleet(run: Run, algorithm: Algorithm, clients: ClientData) -> Fleet:
    """A fleet for these clients, with attackers among them and secure aggregation around it if a federated run asks for it."""
    session, backend = run.session, run.backend
    memory, train = run.directory.checkpoint / "clients", session.config.train
    context = FleetContext(session.model, algorithm, clients, train, session.initial, session.gaps, memory, run.cohort)
    # Pooled data belong to no client.
    train_of = session.config.train_of if run.kind != "centralised" else None
    context = replace(context, in_round=clients.changing, train_of=train_of)
    run_id = run.directory.meta().get("run_id", session.config.digest())
    if not backend.local:
        context = replace(context, run=run_id, config=session.config.toml(), last=_last_rounds(run.directory))
    fleet, secure, attack = backend.open(context), session.parts.secure, session.parts.attack
    if run.kind != "federated":
        return fleet
    if attack is not None:
        falsified = replace(context, data=session.attacked, in_round=session.attacked.changing)
        # In other processes, a client's worker knows from the experiment when to falsify its samples.
        attacked = backend.open(falsified) if attack.falsify and backend.local else fleet
        fleet = AttackedFleet(attack, session.attackers, algorithm, fleet, attacked)
    if secure is None:
        return fleet
    # Imported here because its libraries are optional.
    from fedmllm.secure.fleet import LocalTransport, SecureFleet
    from fedmllm.secure.transport import SecureTransport

    transport = LocalTransport(secure, algorithm, fleet, run_id) if backend.local else fleet
    assert isinstance(transport, SecureTransport), "FleetBackend.secure promises it"
    return SecureFleet(secure, algorithm, fleet, transport, run_id, session.progress)


def _last_rounds(directory: RunDir) -> dict[int, int]:
    """client -> the last round before the checkpoint in which its update was used."""
    checkpoint = directory.load_checkpoint()
    last: dict[int, int] = {}
    for record in directory.rounds()[: checkpoint[0] if checkpoint else 0]:
        refused = {refusal["client"] for refusal in record["refused"]}
        last |= {client: record["round"] for client in record["sampled"] if client not in refused}
    return last


def train_rounds(
    run: Run, algorithm: Algorithm, clients: ClientData, plan: FederationPlan, stage: str
) -> tuple[State, list[dict[str, Any]]]:
    """The server's final state, with the model that is kept, and the records of all rounds, resumed from a checkpoint."""
    session, directory, evaluator = run.session, run.directory, run.evaluator
    checkpoint = directory.load_checkpoint()
    show_notes(run)
    done, saved = checkpoint or (0, {"adapter": session.initial})
    earlier = directory.rounds()[:done]  # none without a checkpoint
    scores = scores_of(earlier, evaluator.score)
    keeping, state = Keeping.resumed(session.config.train, plan.rounds, scores, saved)
    session.progress(stage, done, plan.rounds, "resumed" if checkpoint else "")
    for past in earlier:
        run.tracking.round(past)
    fleet, resume = open_fleet(run, algorithm, clients), (done, state) if checkpoint else None
    rounds = iter(()) if keeping.exhausted else federate(algorithm, fleet, plan, session.initial, resume)
    for record, state in rounds:
        done, note = record.round + 1, f"loss {record.loss:.3f}"
        score: float | None = None
        if evaluator.scores(done, plan.rounds):
            models = personal_models(run, algorithm, state, plan, fleet, done) if algorithm.personal else {0: state}
            record = replace(record, metrics=evaluator.score_round(list(models.values())))
            score = evaluator.score(record.metrics)
            note += f"  {evaluator.metric} {100 * score:.1f} %"
        keeping.add(record.round, score, state)
        record = replace(record, stopped=keeping.exhausted and done < plan.rounds)
        line = asdict(record)
        directory.save_round(line, {**state, **keeping.groups}, session.config.digest())
        run.tracking.round(line)
        note += f"  {record.clock['began'] + record.clock['seconds']:.0f} simulated s" if record.clock else ""
        lost = len(record.clock.get("lost", ()))
        note += f"  {lost} clients lost" if lost else ""
        if refused := len(record.refused) - lost:
            note += f"  {refused} updates refused"
        session.progress(stage, done, plan.rounds, note)
        if record.stopped:
            session.progress("note", 0, 0, keeping.why_stopped(done))
            break
    return keeping.model(state), directory.rounds()


def personal_models(
    run: Run, algorithm: Algorithm, state: State, plan: FederationPlan, fleet: Fleet, done: int
) -> dict[int, State]:
    """client -> its own model after `done` rounds, for all honest clients or a draw of `eval.clients`.

    Raises RunError for one that is no adapter of this model.
    """
    clients = run.evaluator.sample_clients([client for client in plan.clients if client not in run.session.attackers])
    info = plan.info(done, clients)
    models: dict[int, State] = {}
    for client in clients:
        message = algorithm.message(state, client, info)
        adapter = fleet.personal(client, message, done)
        if why := problem_with(adapter, run.session.initial):
            raise RunError(f"client {client}'s own adapter cannot be used ({brief(why)}).")
        models[client] = algorithm.tested(message, adapter, info)
    return models

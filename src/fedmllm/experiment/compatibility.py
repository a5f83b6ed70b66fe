"""Which settings of an experiment exclude each other. Every check raises ConfigError with the reason and a way out."""

from __future__ import annotations

from importlib.util import find_spec

from fedmllm.algorithms import AdapterInfo, Algorithm, algorithms
from fedmllm.algorithms.combining import Robust
from fedmllm.algorithms.factors import modules
from fedmllm.algorithms.traffic import keeps_memory, traffic_of
from fedmllm.attacks.settings import Attack
from fedmllm.config import Experiment
from fedmllm.errors import ConfigError
from fedmllm.privacy.settings import UserLevel
from fedmllm.secure.fixed import FixedPoint
from fedmllm.secure.settings import Pairwise
from fedmllm.tensors import Tensors

PLAIN_LORA = ("lora", "rslora")
"""Kinds of adapters that consist of the factors A and B alone."""


def check_ranks(config: Experiment, algorithm: Algorithm) -> None:
    """The algorithm before it is wrapped must work with the kind of adapter and with the ranks of the clients."""
    kind, name = config.model.adapter.kind, config.algorithm.name
    if algorithm.needs_lora and kind not in PLAIN_LORA:
        raise ConfigError(
            f"algorithm.name: {name!r} works on LoRA's factors A and B alone, and model.adapter.kind = {kind!r} has others; "
            'set the kind to "lora" or "rslora", or choose an algorithm for any adapter, such as "fedavg".'
        )
    if algorithm.needs_core and kind != "lora-xs":
        raise ConfigError(
            f"algorithm.name: {name!r} chooses what is around the matrices R of LoRA-XS, and model.adapter.kind = {kind!r} has "
            'none; set the kind to "lora-xs".'
        )
    if algorithm.needs_core and config.model.quantize != "none":
        raise ConfigError(
            f"algorithm.name: {name!r} needs gradients of the base weights, and model.quantize = {config.model.quantize!r} "
            'stores weights that have none; set it to "none", or choose "fedavg", which needs no gradient.'
        )
    if config.clients.rank and kind == "lora-xs":
        raise ConfigError(
            'clients.rank: model.adapter.kind = "lora-xs" averages matrices R of one size; leave clients.rank out, or set the '
            'kind to "lora" or "rslora".'
        )
    if config.clients.rank and kind not in PLAIN_LORA:
        raise ConfigError(f'clients.rank: model.adapter.kind = {kind!r} has no rank to vary; set it to "lora" or "rslora".')
    ranks = {config.rank_of(client) for client in range(config.partition.clients)}
    if ranks != {config.model.lora.rank} and not algorithm.unequal_ranks:
        capable = [n for n in algorithms.names() if algorithms.build(n, {}).unequal_ranks]
        raise ConfigError(
            f"clients.rank: {name!r} cannot average adapters of ranks {sorted(ranks)} under model.lora.rank = "
            f"{config.model.lora.rank}; give all clients that rank, or choose one of {', '.join(capable)}."
        )


def check_sites(config: Experiment) -> None:
    """Every named site is one client."""
    sites = config.fleet.options.get("sites")
    if sites and len(sites) != config.partition.clients:
        raise ConfigError(
            f"partition.clients = {config.partition.clients}, but fleet.sites names {len(sites)}; every site is one client."
        )


def check_adapter_kind(config: Experiment, algorithm: Algorithm) -> None:
    """A regularisation that ties layers needs an adapter whose tensors belong to layers."""
    if algorithm.needs_layers and config.model.adapter.kind == "prompt-tuning":
        raise ConfigError(
            f"regularization.name: {config.regularization.name!r} ties the middle layers, and the vectors of "
            'model.adapter.kind = "prompt-tuning" belong to no layer; use "fedprox" or "none".'
        )


def check_adapter(config: Experiment, algorithm: Algorithm, adapter: Tensors, info: AdapterInfo) -> None:
    """The tensors that `model.lora.target` selected must suit the algorithm."""
    where = f"model.lora.target = {config.model.lora.target!r}"
    if algorithm.needs_layers and not info.layer:
        raise ConfigError(
            f"regularization.name: {config.regularization.name!r} ties layers of the text model, and {where} adapts none; "
            'let it match some, or set the regularisation to "fedprox" or "none".'
        )
    if algorithm.needs_modalities and not info.modality:
        raise ConfigError(
            f"algorithm.name: {config.algorithm.name!r} treats what only pictures pass through in its own way, and {where} "
            'adapts nothing there; let it match modules of the vision tower or behind it, or choose "fedavg".'
        )
    try:
        if algorithm.needs_lora or config.clients.rank or config.robust.options.get("on") == "product":
            modules(adapter)
    except ValueError as error:
        raise ConfigError(
            f"algorithm.name: {config.algorithm.name!r} cannot work with {where} ({error}); let it match linear layers only."
        ) from None


def check_secure(config: Experiment, algorithm: Algorithm, secure: Pairwise) -> None:
    """Secure aggregation shows the server a mean only, and needs its libraries and enough bits."""
    name = config.secure.name
    if reason := _needs_single_updates(config, algorithm):
        raise ConfigError(f"secure.name: {name!r} shows the server only the mean of the updates, and {reason}.")
    if not all(find_spec(library) for library in ("cryptography", "Crypto")):
        raise ConfigError(f'secure.name: {name!r} needs two more libraries; run pip install "fedmllm[secure]".')
    assert algorithm.averages is not None
    try:
        FixedPoint.of(secure, config.train.clients_per_round, algorithm.averages)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None


def check_attack(config: Experiment, algorithm: Algorithm, attack: Attack) -> None:
    """An attack is a simulation, in which some clients attack and others do not."""
    name, fleet, clients = config.attack.name, config.fleet.name, config.partition.clients
    if fleet not in ("in-process", "ray"):
        raise ConfigError(
            f"attack.name: {name!r} is for simulations only, and fleet.name = {fleet!r} trains on real clients; set "
            'attack.name = "none" or fleet.name = "in-process".'
        )
    if attack.distort and algorithm.packed:
        compressed = config.compression.name != "none"
        packing = (
            f"compression.name = {config.compression.name!r}" if compressed else f"algorithm.name = {config.algorithm.name!r}"
        )
        remedy = 'set it to "none"' if compressed else "choose another algorithm"
        raise ConfigError(
            f"attack.name: {name!r} changes updates, which {packing} has packed before; {remedy}, or choose an attack on "
            "samples."
        )
    if attack.colludes and len({config.rank_of(client) for client in range(clients)}) > 1:
        raise ConfigError(
            f"attack.name: {name!r} averages the attackers' updates, and clients.rank gives them different shapes; give all "
            "clients the same rank, or choose another attack."
        )
    count = len(attack.attackers(clients, config.seed))
    if not 0 < count < clients:
        raise ConfigError(
            f"attack.share = {attack.share} of {clients} clients is {count}; {'raise' if not count else 'lower'} it so that "
            'some clients attack and others are honest, or set attack.name = "none".'
        )
    if attack.start >= config.train.rounds:
        raise ConfigError(
            f"attack.start = {attack.start}, and the last of train.rounds = {config.train.rounds} rounds is "
            f"{config.train.rounds - 1}, so that nobody would attack; lower it."
        )


def _needs_single_updates(config: Experiment, algorithm: Algorithm) -> str:
    """Why the experiment cannot do with the mean of the updates; empty if it can."""
    compression, name = config.compression.name, config.algorithm.name
    if compression != "none":
        return f'compression.name = {compression!r} produces updates that must be unpacked one by one; set it to "none"'
    if algorithm.personal:
        return f"algorithm.name = {name!r} sends every client's own adapter to be tested; choose one model for all"
    if algorithm.averages is None:
        return f"algorithm.name = {name!r} works on single updates; choose one of {_averaging()}"
    if config.fleet.options.get("evaluate"):
        return "fleet.evaluate = true sends every site's own figures; set it to false"
    if config.train.clients_per_round < 2:
        return "the mean of one update is that update; set train.clients_per_round to at least 2"
    return ""


def _averaging() -> str:
    """The algorithms that need the mean of the updates only, and have one model for all."""
    candidates = {n: algorithms.build(n, {}) for n in algorithms.names()}
    return ", ".join(n for n, candidate in candidates.items() if candidate.averages and not candidate.personal)


def check_robust(config: Experiment, algorithm: Algorithm, robust: Robust) -> None:
    """Robust aggregation needs single updates, enough of them, and mostly an algorithm that takes their mean."""
    if why := _without_robust(config, algorithm, robust):
        raise ConfigError(f"robust.name: {config.robust.name!r} {why}.")


def _without_robust(config: Experiment, algorithm: Algorithm, robust: Robust) -> str:
    """Why the experiment excludes this robust aggregation; empty if it does not."""
    name, kind, clients = config.algorithm.name, config.model.adapter.kind, config.train.clients_per_round
    if config.secure.name != "none":
        return f'compares single updates, which secure.name = {config.secure.name!r} hides; set one of them to "none"'
    if config.privacy.name != "none":
        return f'is not needed under privacy.name = {config.privacy.name!r}, which clips every update; set one to "none"'
    if robust.mean_only and algorithm.personal and "adapter" not in traffic_of(algorithm)["down"]:
        return (
            f'sees half of each adapter under algorithm.name = {name!r}; choose one model for all, or robust.name = "norm-clip"'
        )
    if robust.mean_only and algorithm.averages is None:
        others = f'choose one of {_averaging()}, or robust.name = "norm-clip"'
        return f"estimates a mean, and algorithm.name = {name!r} works on single updates; {others}"
    if robust.remembers and algorithm.refactors:
        return f"compares with the last round, and algorithm.name = {name!r} makes new factors in between; choose another"
    if robust.products and kind not in PLAIN_LORA:
        return f'multiplies LoRA\'s factors, and model.adapter.kind = {kind!r} has others; set robust.on = "factors"'
    if clients < robust.least:
        remedy = f"raise it or {robust.instead}"
        return f"needs {robust.least} updates a round with these settings, and train.clients_per_round = {clients}; {remedy}"
    return ""


def check_privacy(config: Experiment, algorithm: Algorithm, privacy: UserLevel) -> None:
    """The figure ε must cover all that the model learns from a client, and the accountant needs its library."""
    if reason := _not_covered(config, algorithm, privacy):
        raise ConfigError(f"privacy.name: {config.privacy.name!r} cannot be promised, because {reason}.")
    if not find_spec("dp_accounting"):
        raise ConfigError(f'privacy.name: {config.privacy.name!r} needs its accountant; run pip install "fedmllm[privacy]".')


def _not_covered(config: Experiment, algorithm: Algorithm, privacy: UserLevel) -> str:
    """Why ε would not hold, and what to do; empty if it does."""
    clients, name = config.partition.clients, config.algorithm.name
    if config.secure.name != "none":
        return (
            f"secure.name = {config.secure.name!r} hides the single updates, which the server must clip, and adds no noise "
            'of its own; set it to "none"'
        )
    if config.robust.name != "none":
        return (
            f"robust.name = {config.robust.name!r} chooses among updates, so that one client changes what the others count; "
            'set it to "none" (the clip bounds each client as well)'
        )
    if config.compression.name != "none":
        return f'compression.name = {config.compression.name!r} cannot pack the noisy mean; set it to "none"'
    if any(config.rank_of(client) != config.model.lora.rank for client in range(clients)):
        return "clients.rank gives clients unequal ranks, which may tell how much data they hold; leave it out"
    if reason := _lets_data_pass(algorithm):
        candidates = {n: algorithms.build(n, {}) for n in algorithms.names()}
        capable = ", ".join(n for n, candidate in candidates.items() if not _lets_data_pass(candidate))
        return f"algorithm.name = {name!r} {reason}; choose one of {capable}"
    if config.fleet.name == "flower":
        return (
            'fleet.name = "flower" tells every site which others take part in a round, and ε holds only while nobody knows; '
            'set it to "in-process" or "ray"'
        )
    if config.train.min_updates > 1:
        return f"train.min_updates = {config.train.min_updates} ends the run if few clients take part; leave it out"
    if privacy.delta >= 1 / clients:
        return (
            f"privacy.delta = {privacy.delta} is not below 1 / {clients} clients, so that one client's data could be published "
            "as they are; lower it"
        )
    return ""


def _lets_data_pass(algorithm: Algorithm) -> str:
    """Which data of clients the algorithm lets pass without noise; empty if none."""
    if algorithm.personal:
        return "leaves part of every model with its client, without noise"
    if algorithm.averages is None or algorithm.summed != ("adapter",):
        return "uses more of the updates than the mean of the adapters, to which noise is added"
    return "lets clients remember earlier rounds, which no clip bounds" if keeps_memory(algorithm) else ""

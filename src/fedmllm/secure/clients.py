"""The client side of secure rounds, for all clients that one process serves. Fleets call it where clients train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from fedmllm.algorithms import Algorithm, RoundInfo, Update, failed
from fedmllm.secure import primitives as crypto
from fedmllm.secure.attempts import Attempts
from fedmllm.secure.client import MaskGroup, Refusal, SecureClient, to_bytes
from fedmllm.secure.fixed import FixedPoint
from fedmllm.secure.settings import Pairwise, Phase
from fedmllm.tensors import State, digest, flatten

Train = Callable[[Mapping[int, State]], Iterable[Update]]
"""(client -> its message of the round) -> their updates, as in a round without secure aggregation."""


class SecureClients:
    """Keeps what each client must know from one phase of a round to the next. It is kept in memory only, for one round.

    All four phases of a round must therefore reach the same object. A request that arrives twice, as happens in networks, gets
    the same answer; a different request in the same phase is refused. What must outlive the process is in `attempts`; without
    it, as in simulations, earlier attempts at a round are not remembered.
    """

    def __init__(self, settings: Pairwise, algorithm: Algorithm, attempts: Attempts | None = None) -> None:
        self._settings, self._algorithm, self._attempts = settings, algorithm, attempts
        self._clients: dict[int, tuple[MaskGroup, SecureClient]] = {}
        self._answers: dict[int, dict[Phase, tuple[str, Update]]] = {}

    def answer(self, phase: Phase, run: str, info: RoundInfo, messages: Mapping[int, State], train: Train) -> Sequence[Update]:
        """The answer of each client: groups of tensors, or a problem. `run` is the permanent name of the run.

        Answers contain nothing else: the counts and metrics of single clients stay in this process.
        """
        digests = {client: digest(flatten(state)) for client, state in messages.items()}
        earlier = {client: self._answers.get(client, {}).get(phase, ("", None)) for client in messages}
        answers = {client: update for client, (sha, update) in earlier.items() if update and sha == digests[client]}
        new = {client: state for client, state in messages.items() if client not in answers}
        if phase == "masked":
            computed = self._masked(run, info, new, train)
        else:
            computed = {c: _attempt(c, partial(self._step, phase, c, run, info, state)) for c, state in new.items()}
        for client, update in computed.items():
            self._remember(client, phase, digests[client], update)
            answers[client] = update
        return [answers[client] for client in messages if client in answers]

    def _remember(self, client: int, phase: Phase, request_digest: str, update: Update) -> None:
        answers = {} if phase == "keys" else self._answers.get(client, {})
        answers.setdefault(phase, (request_digest, update))
        if phase == "unmask":  # the masked vector is large and no longer needed
            answers.pop("masked", None)
        self._answers[client] = answers

    def _step(self, phase: Phase, client: int, run: str, info: RoundInfo, state: State) -> State:
        if phase == "keys":
            attempt = to_bytes(state.get("keys", {}), "attempt", crypto.SECRET)
            group = MaskGroup.of(self._settings, run, info, attempt)
            records = [self._attempts.by_name(run, info, client)] if self._attempts else []
            self._clients[client] = group, SecureClient(group, client, records)
            return self._client(client, run, info).keys()
        secure_client = self._client(client, run, info)
        return secure_client.shares(state) if phase == "shares" else secure_client.unmask(state)

    def _client(self, client: int, run: str, info: RoundInfo) -> SecureClient:
        if client not in self._clients or self._clients[client][0].name[:2] != (run, info.round):
            raise Refusal("secure aggregation: the client was restarted in the middle of the round")
        return self._clients[client][1]

    def _masked(self, run: str, info: RoundInfo, messages: Mapping[int, State], train: Train) -> dict[int, Update]:
        inboxes = {c: {g: t for g, t in state.items() if g != "shares"} for c, state in messages.items()}
        opened = {c: _attempt(c, partial(self._open, c, run, info, messages[c], inboxes[c])) for c in messages}
        refused = {client: answer for client, answer in opened.items() if answer.problem}
        # Clients that refuse do not train; a client whose update cannot be summed withdraws after training.
        received = {client: inbox for client, inbox in inboxes.items() if client not in refused}
        updates = {update.client: update for update in train(received)} if received else {}
        return refused | {c: _attempt(c, partial(self._mask, run, info, received[c], update)) for c, update in updates.items()}

    def _open(self, client: int, run: str, info: RoundInfo, state: State, received: State) -> State:
        records = [self._attempts.by_start(info, client, received)] if self._attempts else []
        self._client(client, run, info).open(state, records)
        return {}

    def _mask(self, run: str, info: RoundInfo, received: State, update: Update) -> State:
        if update.problem:
            raise Refusal(update.problem)
        if self._algorithm.averages is None:
            raise Refusal("secure aggregation: the algorithm needs more than the mean of the updates")
        fixed = FixedPoint.of(self._settings, len(info.sampled), self._algorithm.averages)
        return self._client(update.client, run, info).masked(fixed.encode(change_of(update.groups, received), update), fixed)


def _attempt(client: int, step: Callable[[], State]) -> Update:
    try:
        return Update(client, step(), 0, 0)
    except ValueError as error:  # only this package raises it here, so the message contains no data
        return failed(client, str(error))


def change_of(upload: State, received: State) -> State:
    """The part of an upload that is summed: the change of the adapter, and the other groups unchanged."""
    change = {name: tensor - received["adapter"][name].to(tensor) for name, tensor in upload["adapter"].items()}
    return {**upload, "adapter": change}

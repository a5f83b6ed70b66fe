"""The commands for the model of a finished run: `predict` and `export`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmllm.cli.common import Run, TrustConfig, Verbose, showing
from fedmllm.cli.output import Json, print_json, print_table, say, show, standing
from fedmllm.errors import ConfigError, RunError, UserError

if TYPE_CHECKING:
    from fedmllm.data.samples import Sample
    from fedmllm.runs.trained import Reply, TrainedModel

Client = Annotated[int | None, typer.Option("--client", metavar="K", help="Whose adapter, if every client has its own.")]


def predict(
    directory: Run,
    images: Annotated[
        list[Path] | None, typer.Option("--image", metavar="FILE", help="A picture to ask about; repeatable.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="A text to ask about.")] = None,
    question: Annotated[str | None, typer.Option("--question", help="By default the one that the run's task asks.")] = None,
    choices: Annotated[str | None, typer.Option("--choices", metavar="A,B,…", help="The possible answers.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE.jsonl", help="Questions, one per line; answers are optional.")
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Answer with the untrained model as well.")] = False,
    client: Client = None,
    trust_config: TrustConfig = False,
    as_json: Json = False,
    verbose: Verbose = None,
) -> None:
    """Ask a finished run's model: one question, those of a file, or, without either, one after another at the terminal."""
    from fedmllm.data.questions import question as one_question
    from fedmllm.data.questions import read_questions
    from fedmllm.runs.trained import TrainedModel
    from fedmllm.storage.run_dir import RunDir

    parts = {"--image": images, "--text": text, "--question": question, "--choices": choices}
    given = [option for option, value in parts.items() if value]
    if data is not None and given:
        raise ConfigError(f"{given[0]} and --data exclude each other; write the question into the file, or leave --data out.")
    if not given and data is None and (as_json or not sys.stdin.isatty()):
        raise ConfigError("there is nothing to ask; give --image, --text or --question, or a file of questions with --data.")
    known: frozenset[str] = frozenset()
    with showing(verbose) as progress:
        model = TrainedModel(RunDir(directory), client, trusted=trust_config, progress=progress)
        if data is not None:
            samples, known = read_questions(data, model.usual)
        elif given:
            samples = [one_question(model.usual, tuple(images or ()), text, question, _split(choices))]
        replies = _replies(model, samples, baseline) if data is not None or given else []
    if not replies and data is None:
        _converse(model, baseline)
        return
    if as_json:
        rows = [_row(sample, both, sample.id in known) for sample, both in zip(samples, replies, strict=True)]
        print_json({"run": str(directory), "predictions": rows})
    elif data is None:
        _show(samples[0], replies[0], quiet=verbose is False)
    else:
        _show_all(samples, replies, known)


Replies = Mapping[str, "Reply"]
""""trained", and with --baseline "untrained" -> the reply."""


def _replies(model: TrainedModel, samples: Sequence[Sample], baseline: bool) -> list[Replies]:
    replies = {"trained": model.ask(samples)}
    if baseline:
        replies["untrained"] = model.ask(samples, untrained=True)
    return [dict(zip(replies, of_sample, strict=True)) for of_sample in zip(*replies.values(), strict=True)]


def _row(sample: Sample, replies: Replies, known: bool) -> dict[str, Any]:
    answers = {who: {"answer": reply.answer, "probabilities": reply.probabilities} for who, reply in replies.items()}
    row = {"id": sample.id, "shown": list(replies["trained"].shown), **answers.pop("trained")}
    return row | ({"reference": sample.answer} if known else {}) | answers


def _show(sample: Sample, replies: Replies, quiet: bool = False) -> None:
    """The answer to one question, with the probability of every choice."""
    from rich.table import Table

    seen = " and ".join(replies["trained"].shown) or "neither a picture nor a text"
    for who, reply in replies.items():
        show(f"{who} model: {reply.answer}" if len(replies) > 1 else reply.answer)
    if sample.choices:
        table = Table()
        table.add_column("choice")
        for who in replies:
            table.add_column("probability, %" if len(replies) == 1 else f"{who}, %", justify="right")
        for choice in sample.choices:
            table.add_row(choice, *(f"{100 * reply.probabilities[choice]:.1f}" for reply in replies.values()))
        print_table(table)
    if not quiet:
        say(f"shown to the model: {seen}")


def _show_all(samples: Sequence[Sample], replies: Sequence[Replies], known: frozenset[str]) -> None:
    """A row per question, and how many answers are right as far as this is known."""
    from rich.table import Table

    table = Table()
    of_models = (column for who in replies[0] for column in ("answer" if who == "trained" else who, "probability, %"))
    for column in ("id", "shown", *of_models, "reference"):
        table.add_column(column, justify="right" if column.endswith("%") else "left")
    for sample, of_sample in zip(samples, replies, strict=True):
        cells = [cell for reply in of_sample.values() for cell in _cells(reply)]
        table.add_row(sample.id, "+".join(of_sample["trained"].shown), *cells, sample.answer if sample.id in known else "")
    print_table(table)
    for who in replies[0] if known else ():
        right = sum(r[who].answer == s.answer for s, r in zip(samples, replies, strict=True) if s.id in known)
        show(f"{right} of {len(known)} answers of the {who} model are the reference")


def _cells(reply: Reply) -> tuple[str, str]:
    return reply.answer, f"{100 * reply.probabilities[reply.answer]:.1f}" if reply.probabilities else ""


def _split(choices: str | None) -> list[str] | None:
    return [choice.strip() for choice in choices.split(",")] if choices is not None else None


def _converse(model: TrainedModel, baseline: bool) -> None:
    """Ask for one question after another, until the user ends the input or interrupts."""
    for sample in _asked(model):
        _show(sample, _replies(model, [sample], baseline)[0])


def _asked(model: TrainedModel) -> Iterator[Sample]:
    from fedmllm.data.questions import question as one_question

    say("Empty lines leave a part out, or take what the run's task usually asks. End with Ctrl-D.")
    while True:
        try:
            image, text, question, choices = (
                input(f"{part}: ").strip() or None for part in ("picture", "text", "question", "choices")
            )
        except EOFError:
            return
        try:
            yield one_question(model.usual, Path(image) if image else None, text, question, _split(choices))
        except UserError as error:
            say(f"error: {error}")


def export(
    directory: Run,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A new folder.", show_default=False)],
    merged: Annotated[bool, typer.Option("--merged", help="One whole model instead of an adapter.")] = False,
    client: Client = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="USER/NAME", help="Upload it to the Hugging Face hub, privately.")
    ] = None,
    trust_config: TrustConfig = False,
    verbose: Verbose = None,
) -> None:
    """Write a finished run's model as a folder that loads without fedmllm, with a model card."""
    from fedmllm.models.processors import has_processor
    from fedmllm.models.shipped import SHIPPED
    from fedmllm.report.card import loading, model_card
    from fedmllm.runs import export as exports
    from fedmllm.runs.trained import adapter_folder, config_of
    from fedmllm.storage.atomic import write_atomically
    from fedmllm.storage.run_dir import RunDir

    with showing(verbose) as progress:
        run = RunDir(directory)
        result, config = run.result(), config_of(run, trusted=trust_config)
        adapter = adapter_folder(run, client, result)
        if adapter is None:
            raise RunError(f"{directory} has no adapter to export: its kind is {result['kind']!r}.")
        if push is not None and not merged and not exports.on_hub(config.model.name):
            raise ConfigError(
                f"--push: the base model {config.model.name!r} is not on the Hub, so push the whole: add --merged."
            )
        progress("writing the model", 0, 0, str(to))
        (exports.export_merged if merged else exports.export_adapter)(adapter, config, to)
        base = config.model.name
    tuned = config.model.adapter.kind == "prompt-tuning"
    local = str(to / exports.BASE) if base in SHIPPED else base
    snippet = loading(str(to), str(to) if has_processor(to) else local, merged, tuned, local)
    write_atomically(to / "README.md", model_card(result, base, snippet, merged, client).encode())
    with standing(f"the model is in {to}"):
        if push is not None:
            show(f"pushed to {exports.push(to, push)}")
        show(f"the model is in {to}, its card in {to / 'README.md'}; load it by")
        show("")
        for line in snippet.splitlines():
            show(line)

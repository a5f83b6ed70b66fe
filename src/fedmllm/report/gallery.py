"""A gallery of test samples for the page in HTML: what several models answered, with what they were shown."""

from __future__ import annotations

import base64
import io
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from fedmllm.config import read, validate
from fedmllm.data.dataset import Source, open_source, splits_of
from fedmllm.data.images import Picture, decode
from fedmllm.data.samples import Sample
from fedmllm.errors import DataError, UserError, brief, xml_text
from fedmllm.report.html_page import HtmlPage
from fedmllm.report.page import Markdown
from fedmllm.storage.run_dir import RunDir

MOST_RUNS = 8
_MOST_WRONG, _MOST_RIGHT = 40, 20
_CLOSED = Markdown("Pictures, texts and questions are shown with `--samples`, which opens the data of the runs.")
_PIXELS, _LETTERS = 192, 400
_WORDS = {"both": "both", "image": "image only", "text": "text only"}
Lines = Sequence[Mapping[str, Any]]
"""The predictions of one run for one sample under one pattern: one, or one of each client's own model."""
Answers = dict[tuple[str, str], list[Mapping[str, Any]]]
"""(run, pattern) -> the predictions for one sample."""


def add_gallery(page: HtmlPage, runs: Mapping[str, RunDir], open_samples: bool) -> None:
    """The samples that these runs answer worst and best, by name of the run. With `open_samples`, their pictures and texts are
    read from the data that the runs' own settings name."""
    first = _data_of(next(iter(runs.values()), None))
    same = {name: run for name, run in runs.items() if _data_of(run) == first}  # one id may be another question elsewhere
    runs, left_out = dict(list(same.items())[:MOST_RUNS]), len(runs) - min(len(same), MOST_RUNS)
    answers: dict[str, Answers] = {}
    positive = ""
    for name, run in runs.items():
        positive = run.result().get("positive") or positive
        for line in run.predictions():
            answers.setdefault(str(line["id"]), {}).setdefault((name, str(line["pattern"])), []).append(line)
    if not answers:
        return
    order = sorted(answers, key=lambda sample: _share_right(answers[sample]))
    chosen = order if len(order) <= _MOST_WRONG + _MOST_RIGHT else [*order[:_MOST_WRONG], *order[-_MOST_RIGHT:]]
    page.heading(3, "Samples", _selection(len(chosen), len(order)))
    if left_out:
        page.paragraph(f"Left out here: {left_out}, on other data or beyond the {MOST_RUNS} that are shown.")
    samples, note = _opened(runs, set(chosen)) if open_samples else ({}, "")
    if note or not open_samples:
        page.paragraph(note or _CLOSED)
    patterns = list(dict.fromkeys(pattern for sample in chosen for _, pattern in answers[sample]))
    page.lines += [_filters(list(runs), patterns), '<div class="gallery">']
    page.lines += [_card(name, samples.get(name), answers[name], list(runs), patterns, positive) for name in chosen]
    page.lines.append("</div>")


def _data_of(run: RunDir | None) -> Any:
    """What the test samples of a run depend on."""
    settings = run.settings() if run is not None else {}
    return settings.get("task"), settings.get("eval", {}).get("split")


def _selection(shown: int, every: int) -> str:
    if shown == every:
        return f"All {every} test samples, those that most models get wrong first."
    return f"Of {every} test samples, the {_MOST_WRONG} that most models get wrong and the {_MOST_RIGHT} that most get right."


def _share_right(answers: Answers) -> float:
    lines = [bool(line["correct"]) for of_pattern in answers.values() for line in of_pattern]
    return sum(lines) / len(lines)


def _opened(runs: Mapping[str, RunDir], ids: set[str]) -> tuple[dict[str, Sample], str]:
    """(the samples of these ids, a sentence on what could not be read)."""
    samples: dict[str, Sample] = {}
    for run in runs.values():
        if ids <= samples.keys():
            break
        try:
            config = validate(read(run.config), str(run.config))
            split = splits_of(config)[-1]
            source: Source | None = open_source(config.task)
            while source is not None:
                loaded = source.task.load(split) if split in source.task.splits else ()
                samples |= {s.id: s.cleaned() for s in loaded if isinstance(s, Sample) and s.id in ids}
                source = source.companion
        except UserError as error:
            return samples, f"The data cannot be opened: {error}"
    missing = len(ids - samples.keys())
    return samples, f"{missing} of these samples are not in the data as it is here." if missing else ""


def thumbnail(picture: Picture) -> str:
    """A small copy as a `data:` address. Raises DataError if the picture cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            small = decode(picture)
    except Exception as error:  # decoders raise many types of errors on damaged bytes
        raise DataError(f"a picture cannot be decoded ({error}).") from None
    small.thumbnail((_PIXELS, _PIXELS))
    encoded = io.BytesIO()
    small.save(encoded, "WEBP", quality=70)
    return f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _card(
    name: str, sample: Sample | None, answers: Answers, runs: Sequence[str], patterns: Sequence[str], positive: str
) -> str:
    parts = ['<article class="sample">']
    if sample is not None:
        parts += _shown(sample)
    reference = next(iter(answers.values()))[0]["answer"]
    parts.append(f"<p>Answer: <strong>{_text(reference)}</strong></p>")
    head = "".join(f'<th scope="col">{_text(_WORDS.get(pattern, pattern))}</th>' for pattern in patterns)
    parts.append(f'<div class="scroll"><table><thead><tr><th scope="col">model</th>{head}</tr></thead><tbody>')
    for number, run in enumerate(runs):
        cells = [_cell(number, pattern, answers.get((run, pattern), []), positive) for pattern in patterns]
        parts.append(f'<tr><th scope="row">{_text(run)}</th>{"".join(cells)}</tr>')
    return "".join([*parts, f'</tbody></table></div><p class="id">{_text(name)}</p></article>'])


def _shown(sample: Sample) -> list[str]:
    parts = []
    for number, picture in enumerate(sample.pictures, start=1):
        which = f"picture {number}" if len(sample.pictures) > 1 else "the picture"
        try:
            parts.append(f'<img src="{thumbnail(picture)}" alt="{which} of sample {_text(sample.id)}">')
        except DataError as error:
            parts.append(f"<p>{xml_text(str(error))}</p>")
    parts.append(f'<p class="question">{_text(sample.question)}</p>')
    if sample.text is not None:
        parts.append(f"<p>{_text(sample.text)}</p>")
    if sample.choices:
        parts.append(f"<p><small>Choices: {_text(', '.join(sample.choices))}</small></p>")
    return parts


def _cell(run: int, pattern: str, lines: Lines, positive: str) -> str:
    """What one run said under one pattern; of clients' own models, the most frequent answer."""
    if not lines:
        return "<td>–</td>"
    said, _ = Counter(str(line["predicted"]) for line in lines).most_common(1)[0]
    line = next(line for line in lines if str(line["predicted"]) == said)
    right = sum(bool(line["correct"]) for line in lines)
    outcome, mark = ("right", "✓") if 2 * right > len(lines) else ("wrong", "✗")
    details = [f"{right} of {len(lines)} right"] if len(lines) > 1 else []
    if len(lines) == 1 and isinstance(line.get("probability"), int | float):
        details.append(f"{100 * line['probability']:.0f} %")
    elif len(lines) == 1 and isinstance(line.get("score"), int | float):
        details.append(f"P({positive}) {100 * line['score']:.0f} %")
    small = "".join(f" <small>{_text(detail)}</small>" for detail in details)
    words = f'<b aria-hidden="true">{mark}</b> {_text(said) or "(nothing)"}<span class="hint"> {outcome}</span>{small}'
    return f'<td class="{outcome}" data-run="{run}" data-pattern="{_text(pattern)}">{words}</td>'


def _text(text: object) -> str:
    return xml_text(brief(str(text), _LETTERS))


def _filters(runs: Sequence[str], patterns: Sequence[str]) -> str:
    outcomes = {"": "any", "wrong": "wrong", "right": "right", "both": "right and wrong"}
    selects = [
        _select("outcome", "Answers", outcomes),
        _select("pattern", "Shown", {"": "anything", **{pattern: _WORDS.get(pattern, pattern) for pattern in patterns}}),
        _select("run", "Model", {"": "any", **{str(number): run for number, run in enumerate(runs)}}),
    ]
    search = '<label>Contains<input type="search" name="words"></label>'
    return f'<form class="filters" hidden>{"".join(selects)}{search}<output aria-live="polite"></output></form>'


def _select(name: str, label: str, options: Mapping[str, str]) -> str:
    inner = "".join(f'<option value="{_text(value)}">{_text(text)}</option>' for value, text in options.items())
    return f'<label>{label}<select name="{name}">{inner}</select></label>'

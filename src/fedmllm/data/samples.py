"""The schema of samples and tasks."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from fedmllm.data.images import Images, Picture, pictures_of

Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = ("image", "text")
VISIBLE: Mapping[tuple[bool, bool], frozenset[Modality]] = {
    (False, False): frozenset(),
    (True, False): frozenset(("image",)),
    (False, True): frozenset(("text",)),
    (True, True): frozenset(MODALITIES),
}
"""(whether there is an image, whether there is a text) -> the modalities."""
Split = Literal["train", "test"]
ProblemKind = Literal[
    "missing picture", "undecodable picture", "picture too large", "path outside the folder", "unreadable entry", "wrong value",
    "duplicate id", "empty answer", "answer not among the choices", "too many choices", "prompt too long",
    "picture the model refuses", "bad sample",
]  # fmt: skip
"""The kinds by which `fedmllm check` counts bad samples."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""The labels of lettered choices, of which there can be no more than letters."""


@lru_cache(1 << 12)  # choices and answers come again and again
def clean(text: str) -> str:
    """An answer, a choice or the name of a class as it is used everywhere: in Unicode's composed form (NFC) and without white
    space around it. White space inside it is kept, because an answer may have several lines."""
    return unicodedata.normalize("NFC", text).strip()


@dataclass(frozen=True)
class Sample:
    """One question with its answer, and the image and text it is about."""

    id: str
    question: str
    """Part of every sample; it is not a modality."""
    answer: str
    image: Images | None = None
    """The image modality: one picture, or a tuple of several in the order in which they are shown."""
    text: str | None = None
    """The text modality, such as a tweet or a report."""
    choices: tuple[str, ...] | None = None
    """All possible answers, if the set is closed."""
    lettered: bool = False
    """Whether the prompt lists the choices as (A), (B), …"""
    label: str = ""
    """The class, for partitions by label."""
    source: str = ""
    """The natural owner, such as a site or an author, for partitions by source."""
    where: str = ""
    """File and line, for messages."""
    closed: bool | None = None
    """Whether the published data calls the question closed; if it does not say, a question with choices counts as closed."""

    def __post_init__(self) -> None:
        if isinstance(self.image, tuple) and len(self.image) < 2:  # a tuple of one picture is that picture, an empty one none
            object.__setattr__(self, "image", self.image[0] if self.image else None)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The pictures in their order; scenarios show all of them or none."""
        return pictures_of(self.image)

    def cleaned(self) -> Sample:
        """The sample with its answer, its choices, its label and its source cleaned."""
        choices = tuple(map(clean, self.choices)) if self.choices is not None else None
        answer, label, source = map(clean, (self.answer, self.label, self.source))
        same = (answer, choices, label, source) == (self.answer, self.choices, self.label, self.source)
        return self if same else replace(self, answer=answer, choices=choices, label=label, source=source)

    @property
    def modalities(self) -> frozenset[Modality]:
        """The modalities of the sample itself, before a scenario removes any."""
        return VISIBLE[self.image is not None, self.text is not None]

    def showing(self, modalities: frozenset[Modality]) -> Sample:
        """The sample without its other modalities."""
        if self.modalities <= modalities:
            return self
        image, text = (self.image if "image" in modalities else None), (self.text if "text" in modalities else None)
        return replace(self, image=image, text=text)

    @property
    def is_closed(self) -> bool:
        """Whether its score counts among the closed questions. Without choices, the model still answers freely."""
        return self.choices is not None if self.closed is None else self.closed


@dataclass(frozen=True)
class Problem:
    """A sample that cannot be used: `where` gives file, line and id, and `what` the reason."""

    where: str
    what: str
    kind: ProblemKind = "bad sample"

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Task:
    """A data set: `load(split)` yields its samples, and a Problem in place of each sample that cannot be used."""

    name: str
    metric: Literal["accuracy", "macro-f1", "auc"]
    load: Callable[[Split], Iterable[Sample | Problem]]
    positive: str | None = None
    """For AUC: the answer whose probability is the score."""
    splits: tuple[Split, ...] = ("train", "test")
    """A task without a test split can only be a companion."""
    ceiling: Mapping[str, float] = field(default_factory=dict)
    """pattern -> the best value of `metric` that any model can reach, if it is known."""


@dataclass(frozen=True)
class Loaded:
    """The samples of a split that can be used, ordered by id, and the problems of those that cannot."""

    samples: Sequence[Sample]
    problems: list[Problem] = field(default_factory=list)
    stretched: int = 0
    """The number of distinct pictures among the samples whose 16-bit grey is stretched to 8 bits."""

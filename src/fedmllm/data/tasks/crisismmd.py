"""CrisisMMD, the humanitarian task: what do a tweet and its picture from a disaster show? (Alam et al. 2018, 1805.00713.)

The published folder holds `crisismmd_datasplit_all/task_humanitarian_text_img_{train,dev,test}.tsv` (or, where the labels of
text and picture agree, `crisismmd_datasplit_agreed_label/task_humanitarian_text_img_agreed_lab_{train,dev,test}.tsv`) beside
`data_image/`, to which the column `image` leads. The class is `label_image`; a row without one has the class of its tweet,
`label`. URLs are taken out of the tweets: many lead to a page that names the event. A tweet that is nothing else has no text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fedmllm.data.files import Entry, EntryError, find, inside, samples_of, tab_separated
from fedmllm.data.samples import Problem, Sample, Split, Task
from fedmllm.data.tasks import tasks

CLASSES = (
    "affected_individuals",
    "infrastructure_and_utility_damage",
    "injured_or_dead_people",
    "missing_or_found_people",
    "rescue_volunteering_or_donation_effort",
    "vehicle_damage",
    "other_relevant_information",
    "not_humanitarian",
)
CHOICES = tuple(name.replace("_", " ") for name in CLASSES)
COLUMNS = ("event_name", "image_id", "tweet_text", "image", "label")
FILES = {
    "all": "crisismmd_datasplit_all/task_humanitarian_text_img_{}.tsv",
    "agreed": "crisismmd_datasplit_agreed_label/task_humanitarian_text_img_agreed_lab_{}.tsv",
}
URL = re.compile(r"(?:https?:|www\.|pic\.twitter\.com/)\S*|https?…", re.IGNORECASE)  # a long tweet ends in half of one


def without_urls(tweet: str) -> str:
    """The tweet's words, one space between them."""
    return " ".join(URL.sub(" ", tweet).split())


def _sample(entry: Entry, folder: Path) -> Sample:
    column = "label_image" if entry.text("label_image", required=False) else "label"
    label = entry.text(column)
    if label not in CLASSES:
        raise EntryError(f"{column!r} is {label!r}, which is none of {', '.join(CLASSES)}")
    answer = CHOICES[CLASSES.index(label)]
    return Sample(
        id=f"crisismmd/{entry.text('image_id')}",
        question="which kind of humanitarian information is this?",
        answer=answer,
        image=inside(folder, entry.text("image")),
        text=without_urls(entry.text("tweet_text", required=False)) or None,
        choices=CHOICES,
        lettered=True,
        label=answer,
        source=entry.text("event_name", required=False),
        where=entry.where,
    )


@tasks.register("crisismmd")
def crisismmd(*, data_dir: str, split_set: Literal["all", "agreed"] = "all", test_set: Literal["test", "dev"] = "test") -> Task:
    """Tweets with pictures from disasters in 8 classes, from the published files in `data_dir`; macro-F1."""

    def load(split: Split) -> Iterator[Sample | Problem]:
        path = find("crisismmd", data_dir, FILES[split_set].format("train" if split == "train" else test_set))
        return samples_of(tab_separated(path, COLUMNS), lambda entry: _sample(entry, Path(data_dir)))

    return Task("crisismmd", "macro-f1", load)

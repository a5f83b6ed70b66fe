"""CrisisMMD, the humanitarian task: what do a tweet and its image from a disaster show? (Alam et al. 2018, 1805.00713.)

The published folder contains `crisismmd_datasplit_all/task_humanitarian_text_img_{train,dev,test}.tsv` (or, for the samples
whose text and image have the same label, `crisismmd_datasplit_agreed_label/task_humanitarian_text_img_agreed_lab_….tsv`) and
`data_image/`, where the paths in the column `image` begin. The class is `label_image`; if it is empty, it is `label`, the
class of the tweet. URLs are removed from the tweets, because many lead to a page that names the event; a tweet that consists
of URLs only has no text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fedmllm.data.files import Entry, EntryError, find_file, path_inside, samples_of, tab_separated
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
URL = re.compile(
    r"(?:https?:|www\.|pic\.twitter\.com/)\S*|https?…", re.IGNORECASE
)  # a long tweet ends in the beginning of a URL


def without_urls(tweet: str) -> str:
    """The words of the tweet without URLs, separated by single spaces."""
    return " ".join(URL.sub(" ", tweet).split())


def _sample(entry: Entry, folder: Path) -> Sample:
    column = "label_image" if entry.text("label_image", required=False) else "label"
    label = entry.text(column)
    if label not in CLASSES:
        raise EntryError(f"{column!r} is {label!r}, which is not one of {', '.join(CLASSES)}")
    answer = CHOICES[CLASSES.index(label)]
    return Sample(
        id=f"crisismmd/{entry.text('image_id')}",
        question="which kind of humanitarian information is this?",
        answer=answer,
        image=path_inside(folder, entry.text("image")),
        text=without_urls(entry.text("tweet_text", required=False)) or None,
        choices=CHOICES,
        lettered=True,
        label=answer,
        source=entry.text("event_name", required=False),
        where=entry.where,
    )


@tasks.register("crisismmd")
def crisismmd(*, data_dir: str, split_set: Literal["all", "agreed"] = "all", test_set: Literal["test", "dev"] = "test") -> Task:
    """Tweets with images from disasters, in 8 classes; the published files in `data_dir`; macro-F1."""

    def load(split: Split) -> Iterator[Sample | Problem]:
        path = find_file("crisismmd", data_dir, FILES[split_set].format("train" if split == "train" else test_set))
        return samples_of(tab_separated(path, COLUMNS), lambda entry: _sample(entry, Path(data_dir)))

    return Task("crisismmd", "macro-f1", load)

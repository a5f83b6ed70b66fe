"""Small folders in the published layouts of the data sets, including their quirks. The contents are invented, not excerpts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

COLORS = [(220, 30, 30), (30, 200, 30), (30, 30, 220)]
HUMANITARIAN = ["affected_individuals", "vehicle_damage", "not_humanitarian", "other_relevant_information"]
TSV_COLUMNS = "event_name tweet_id image_id tweet_text image label label_text label_image label_text_image".split()


def picture(path: Path, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), COLORS[number % 3]).save(path)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_table(path: Path, rows: list[dict[str, Any]], columns: list[str] = TSV_COLUMNS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(columns), *("\t".join(str(row[c]) for c in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def memes(folder: Path) -> None:
    number = 40000
    for split, count in (("train", 8), ("dev_seen", 3), ("test_seen", 4)):
        lines = []
        for _ in range(count):
            number += 1
            line = {"id": number, "img": f"img/{number}.png", "label": number % 2, "text": f"look at number {number}"}
            picture(folder / line["img"], number)  # type: ignore[operator]
            lines.append(line)
        write_lines(folder / f"{split}.jsonl", lines)


def tweet(number: int, event: str = "hurricane_irma") -> dict[str, Any]:
    return {
        "event_name": event,
        "tweet_id": 917791044158185473 + number,
        "image_id": f"{917791044158185473 + number}_0",
        "tweet_text": f'RT @someone: "Water everywhere, no. {number} https://t.co/abc{number}',
        "image": f"data_image/{event}/6_9_2017/{number}_0.jpg",
        "label": HUMANITARIAN[(number + 1) % 4],
        "label_text": HUMANITARIAN[(number + 1) % 4],
        "label_image": HUMANITARIAN[number % 4],
        "label_text_image": "Negative",
    }


def crisis(folder: Path) -> None:
    sets = {
        "crisismmd_datasplit_all/task_humanitarian_text_img_{}.tsv": 0,
        "crisismmd_datasplit_agreed_label/task_humanitarian_text_img_agreed_lab_{}.tsv": 100,
    }
    for name, first in sets.items():
        for split, numbers in (("train", range(8)), ("dev", range(8, 10)), ("test", range(10, 14))):
            rows = [tweet(first + i, ("hurricane_irma", "mexico_earthquake")[i % 2]) for i in numbers]
            for row in rows:
                picture(folder / row["image"], row["tweet_id"])
            write_table(folder / name.format(split), rows)


def rad_entry(number: int, phrase: str = "freeform", **values: Any) -> dict[str, Any]:
    closed = number % 2 == 0
    return {
        "qid": number,
        "phrase_type": phrase,
        "qid_linked_id": f"03f451ca-{number}",
        "image_name": f"synpic{54610 + number % 3}.jpg",
        "image_organ": ("HEAD", "CHEST", "ABD")[number % 3],
        "question": f"are regions of the brain infarcted in no. {number}?" if closed else "how many lesions are there?",
        "question_type": ("PRES", "COUNT")[number % 2],
        "answer": ("Yes", "No")[number // 2 % 2] if closed else number,
        "answer_type": "CLOSED " if closed else "OPEN",
        **values,
    }


def rad(folder: Path) -> None:
    phrases = ["freeform", "para"] * 4 + ["test_freeform", "test_para"] * 3
    entries = [rad_entry(i, phrase) for i, phrase in enumerate(phrases)]
    entries[10] |= {
        "question": "is this a ct or an mri?",
        "answer": "CT",
    }  # a closed question whose answer is neither yes nor no
    write_json(folder / "VQA_RAD Dataset Public.json", entries)
    for number in range(3):
        picture(folder / "VQA_RAD Image Folder" / f"synpic{54610 + number}.jpg", number)


def slake_entry(number: int, language: str = "en", **values: Any) -> dict[str, Any]:
    closed = number % 2 == 0
    words = {
        "en": ("Is there a liver?", "Yes", "What is the organ?", "Liver"),
        "zh": ("有肝脏吗?", "有", "是什么器官?", "肝脏"),
    }[language]
    return {
        "img_id": number % 3,
        "img_name": f"xmlab{number % 3}/source.jpg",
        "question": words[0] if closed else words[2],
        "answer": words[1] if closed else words[3],
        "q_lang": language,
        "location": ("Abdomen", "Lung")[number % 2],
        "modality": "MRI",
        "answer_type": "CLOSED" if closed else "OPEN",
        "base_type": "vqa",
        "content_type": ("Organ", "Abnormality")[number // 2 % 2],
        "triple": ["vhead", "_", "_"],
        "qid": number,
        **values,
    }


def slake(folder: Path) -> None:
    for split, first, count in (("train", 0, 12), ("validate", 12, 4), ("test", 16, 8)):
        write_json(folder / f"{split}.json", [slake_entry(first + i, ("en", "zh")[i // 2 % 2]) for i in range(count)])
    for number in range(3):
        picture(folder / "imgs" / f"xmlab{number}" / "source.jpg", number)


def alpaca(folder: Path) -> None:
    cards = [
        {"instruction": "Answer this question truthfully", "input": f"What is sign no. {i}?", "output": f"A sign of {i}."}
        for i in range(6)
    ]
    write_json(folder / "medical_meadow_wikidoc_medical_flashcards.json", cards)


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "hateful-memes": memes,
    "crisismmd": crisis,
    "vqa-rad": rad,
    "slake": slake,
    "medalpaca": alpaca,
}

"""Write two hundred short opinions with the label yes or no: opinions/train.csv and opinions/dev.csv.

    python examples/opinions.py [FOLDER]

The sentences are made for this, from things, adjectives and ways to say them, of which a third turn the
adjective into its opposite. dev.csv has adjectives that train.csv has not: so what is scored is whether a
model knows praise from complaint, not which words it has seen.
"""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Sequence
from pathlib import Path

THINGS = (
    *("bread", "book", "chair", "coat", "concert", "film", "game", "garden", "guide", "hotel"),
    *("lecture", "market", "museum", "phone", "play", "room", "song", "soup", "train", "walk"),
)
PRAISE = (
    *("lovely", "great", "excellent", "wonderful", "delicious", "brilliant", "charming", "superb"),
    *("delightful", "pleasant", "perfect", "splendid", "amazing", "fantastic", "beautiful", "enjoyable"),
)
COMPLAINT = (
    *("awful", "terrible", "dreadful", "poor", "dull", "disappointing", "bland", "horrible"),
    *("boring", "miserable", "annoying", "mediocre", "shabby", "ugly", "tedious", "useless"),
)

#: Ways to say it, and those that say the opposite.
SAID = ("The {} was {}.", "The {} was rather {}.", "The {} was really {}.", "The {} was quite {}.")
TURNED = ("The {} was anything but {}.", "Nobody would call the {} {}.")


def opinions(praise: Sequence[str], complaint: Sequence[str]) -> list[tuple[str, str]]:
    """Return every sentence that these adjectives make, with its label."""
    found = []
    for adjectives, label, opposite in ((praise, "yes", "no"), (complaint, "no", "yes")):
        for thing in THINGS:
            for adjective in adjectives:
                found += [(way.format(thing, adjective), label) for way in SAID]
                found += [(way.format(thing, adjective), opposite) for way in TURNED]
    return found


def main(folder: Path) -> None:
    """Write 140 rows to train on and 60 to score, drawn with one seed and never twice."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    for name, part, count in (("train", slice(10), 140), ("dev", slice(10, None), 60)):
        rows = draw.sample(opinions(PRAISE[part], COMPLAINT[part]), count)
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("text", "label"), *rows])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "opinions"))

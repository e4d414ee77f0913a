"""Write the sentences that people rated for VADER (Hutto and Gilbert 2014) as files for a classifier.

    pip download --no-deps --no-binary :all: vaderSentiment==2.5
    python examples/benchmarks/sentiment.py vaderSentiment-2.5.tar.gz out/sentiment

`movies`: sentences of film reviews, negative or positive (rated beyond ±0.5, of -4 to 4). `tweets`: negative, neutral
or positive. Rows are shuffled with seed 0; the first 2,000 are for training, the next 1,000 for testing.
"""

from __future__ import annotations

import csv
import io
import random
import sys
import tarfile
from pathlib import Path

ARCHIVE = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {"movies": "movieReviewSnippets_GroundTruth.txt", "tweets": "tweets_GroundTruth.txt"}


def main(package: str, folder: str) -> None:
    with tarfile.open(package) as outer:
        inner = outer.extractfile(ARCHIVE)
        assert inner is not None, f"{package} is not the source archive of vaderSentiment 2.5"
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as resources:
            for name, file in FILES.items():
                found = resources.extractfile(f"hutto_ICWSM_2014/{file}")
                assert found is not None
                write(Path(folder) / name, found.read().decode("utf-8", errors="replace"), neutral=name == "tweets")


def write(folder: Path, lines: str, neutral: bool) -> None:
    rows = []
    for line in lines.splitlines():
        _, rating, text = line.split("\t")
        label = "positive" if float(rating) > 0.5 else "negative" if float(rating) < -0.5 else "neutral"
        if label != "neutral" or neutral:
            rows.append((text, label))
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", rows[:2000]), ("test", rows[2000:3000])):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *part])


if __name__ == "__main__":
    main(*sys.argv[1:])

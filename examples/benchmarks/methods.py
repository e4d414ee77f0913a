"""Methods and initializations compared, each at its best of the same learning rates: texts with labels, and GSM8K.

    python examples/benchmarks/methods.py --data labeled --train-file train.csv --test-file test.csv --minutes 60
    python examples/benchmarks/methods.py --data gsm8k --folder GSM8K --methods lora dora --minutes 60
    python examples/benchmarks/methods.py --table

`labeled`: the first `--examples` rows of each class with MiniLM, whose head starts at the class means; 8 epochs of
batches of 16. `gsm8k`: the first `--examples` of the problems drawn with seed 0, and SmolLM2-135M-Instruct; one epoch
of packed rows of 512 tokens, one a step. Rank and alpha are 16, on every linear layer; cosine schedule.

First each method is trained at each rate with seed 0 and evaluated on training rows that are held out. Once a method
has all rates, its best one is evaluated on the test set, for each of `--seeds`. With `--climb`, rates are tried from
the middle of the grid outward, as long as they become better. `full` (all weights are trained) takes a tenth of each
rate. Each run is appended to `--json` and skipped if it is there already, so the study can be made in slices:
`--methods`, `--seeds`, and no new run begins after `--minutes`. `--bf16` computes products in bfloat16 (autocast).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_lora import LoraSFTConfig, LoraSFTTrainer, LoraTrainer, LoraTrainingArguments, build_classifier, start_head
from hf_lora.errors import TrainingError
from hf_lora.evaluation.metrics import build_compute_metrics

sys.path.append(str(Path(__file__).parents[1]))  # for studies.py and smollm2.py
import studies
from smollm2 import base_folder

FULL = "full"
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"lora_use_rslora": True},
    "dora": {"lora_use_dora": True},
    "pissa": {"lora_init": "pissa"},
    "eva": {"lora_init": "eva"},
    "lora_ga": {"lora_init": "lora_ga"},
    "loraplus": {"loraplus_lr_ratio": 4.0},
    "lora_fa": {"lora_method": "lora_fa"},
}
"""Method -> its fields of `LoraTrainingArguments`."""
NAMES = {
    "lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "pissa": "PiSSA", "eva": "EVA", "lora_ga": "LoRA-GA",
    "loraplus": "LoRA+ (B at 4 times)", "lora_fa": "LoRA-FA", FULL: "full fine-tuning",
}  # fmt: skip
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
EXAMPLES = {"labeled": 10, "gsm8k": 300}
LENGTH = 512
"""Tokens of a packed row of GSM8K."""
BF16 = " bf16"
"""The end of the settings of a run with bfloat16."""
HELD_OUT = 100
"""Problems of GSM8K behind those that are trained on."""


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(EXAMPLES))
    parser.add_argument("--train-file")
    parser.add_argument("--test-file")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="category")
    parser.add_argument("--folder", type=Path, help="of GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--base", type=Path, help="folder of another base model")
    parser.add_argument("--examples", type=int, help="of each class, or problems; default: 10 or 300")
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--methods", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="the grid, in rising order")
    parser.add_argument("--climb", action="store_true", help="stop at the first rate that is worse than the last one")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after that")
    parser.add_argument("--json", type=Path, default=studies.RECORDS)
    parser.add_argument("--table", action="store_true", help="print the tables for docs/methods.md, and exit")
    args = parser.parse_args(words)
    needed = {"labeled": ("train_file", "test_file"), "gsm8k": ("folder",)}.get(args.data, ("data",))
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(args, name) is None]
    if missing and not args.table:
        parser.error(f"{', '.join(missing)} is needed")
    args.examples = args.examples or EXAMPLES.get(args.data)
    return args


def arguments(
    cls: Any, args: argparse.Namespace, method: str, rate: float, seed: int, folder: str, **more: Any
) -> Any:
    adapter = {} if method == FULL else {"lora_r": 16, "lora_alpha": 16, **ADAPTERS[method]}
    return cls(
        folder, learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=0.06, save_strategy="no",
        report_to="none", disable_tqdm=True, logging_strategy="no", seed=seed, max_steps=args.max_steps,
        dataloader_pin_memory=False, bf16=args.bf16, use_cpu=not torch.accelerator.is_available(), **adapter, **more,
    )  # fmt: skip


def labeled(args: argparse.Namespace, method: str, rate: float, seed: int, validate: bool) -> tuple[float, float]:
    """(accuracy, seconds) of a run on labeled texts."""
    train, test = studies.part_of(studies.labeled_rows(args), args.examples, validate)
    base, labels = args.base or studies.minilm(), sorted({row["label"] for row in train})
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [studies.encoded(tokenizer, part, labels) for part in (train, test)]
    collator = DataCollatorWithPadding(tokenizer)
    set_seed(seed)
    model = build_classifier(base, labels, pooling="mean")
    start_head(model, rows[0], collator=collator, progress=False)
    with TemporaryDirectory() as folder:
        trainer = (Trainer if method == FULL else LoraTrainer)(
            model,
            arguments(
                TrainingArguments if method == FULL else LoraTrainingArguments, args, method, rate, seed, folder,
                num_train_epochs=8, per_device_train_batch_size=16, per_device_eval_batch_size=128,
                train_sampling_strategy="group_by_length",
            ),
            collator, train_dataset=rows[0], eval_dataset=rows[1], compute_metrics=build_compute_metrics(["accuracy"]),
        )  # fmt: skip
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        return trainer.evaluate()["eval_accuracy"], seconds


def gsm8k(args: argparse.Namespace, method: str, rate: float, seed: int, validate: bool) -> tuple[float, float]:
    """(loss in nats a token, seconds) of a run on GSM8K."""
    base = args.base or base_folder()
    tokenizer = AutoTokenizer.from_pretrained(base)
    drawn = studies.problems(args.folder, "train")
    held = drawn[args.examples : args.examples + HELD_OUT] if validate else studies.problems(args.folder, "test")
    train, test = ([studies.answered(tokenizer, chat) for chat in part] for part in (drawn[: args.examples], held))
    common: dict[str, Any] = {"num_train_epochs": 1, "per_device_train_batch_size": 1}
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    with TemporaryDirectory() as folder:
        trainer: Any
        made = (args, method, rate, seed, folder)
        if method == FULL:
            settings = arguments(TrainingArguments, *made, remove_unused_columns=False, **common)
            trainer = Trainer(model, settings, studies.Documents(), train_dataset=studies.packed(train, LENGTH))
        else:
            more = {"packing": True, "max_length": LENGTH, "gradient_checkpointing": False, **common}
            settings = arguments(LoraSFTConfig, *made, **more)
            trainer = LoraSFTTrainer(
                model, settings, train_dataset=Dataset.from_list(train), processing_class=tokenizer
            )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        return studies.loss_a_token(trainer.model, test), seconds


STUDIES = {"labeled": (labeled, "accuracy", 1), "gsm8k": (gsm8k, "nats a token", -1)}
"""Data -> what trains, its metric, and 1 if higher values are better."""


def run(args: argparse.Namespace) -> None:
    """Make the runs that are not in the file."""
    train, metric, sign = STUDIES[args.data]
    runs, end = studies.Runs(args.json), time.monotonic() + 60 * args.minutes
    is_labeled = args.data == "labeled"
    name = f"{Path(args.train_file).resolve().parent.name}, {args.examples} a class" if is_labeled else "gsm8k"
    where = {
        "study": "methods", "data": name if is_labeled else f"{name}, {args.examples} examples",
        "model": args.base.name if args.base else "MiniLM-L6" if is_labeled else "SmolLM2-135M-Instruct",
    }  # fmt: skip

    def key(method: str, rate: float, seed: int, split: str) -> dict[str, Any]:
        settings = f"rate={rate:g}{BF16 if args.bf16 else ''}"
        return {**where, "split": split, "method": method, "settings": settings, "seed": seed}

    def made(method: str, rate: float, seed: int, split: str) -> float | None:
        """The result of a run as a number to be maximized; None if it is not there and the time is over."""
        found = runs.find(key(method, rate, seed, split))
        if found is None and time.monotonic() < end:
            value, seconds, megabytes = None, 0.0, 0.0
            try:
                (value, seconds), megabytes = studies.alone(train, args, method, rate, seed, split != studies.TEST)
            except TrainingError as error:  # it diverged
                print(error, file=sys.stderr)
            found = runs.add(key(method, rate, seed, split), metric, value, seconds, megabytes)
        if found is None:
            return None
        return -math.inf if found["value"] is None else sign * found["value"]

    for method in args.methods:
        rates = [rate * (0.1 if method == FULL else 1) for rate in args.rates]
        best = best_of(rates, lambda rate, name=method: made(name, rate, 0, studies.HELD_OUT), args.climb)
        if best is not None:
            for seed in args.seeds:
                made(method, best, seed, studies.TEST)


def best_of(rates: list[float], value: Callable[[float], float | None], climb: bool) -> float | None:
    """The rate with the highest value; None as soon as one has no value, or if all diverge.

    Args:
        climb: go from the middle to the higher and then to the lower rates, up to the first that is worse.
    """
    middle, highest = len(rates) // 2, -math.inf
    best: float | None = None
    for way in [rates[middle:], rates[:middle][::-1]] if climb else [rates]:
        for rate in way:
            found = value(rate)
            if found is None:
                return None
            if found > highest:
                best, highest = rate, found
            elif climb and best is not None:
                break
        if best != rates[middle] and best is not None:
            break
    return best


def tables(runs: studies.Runs) -> str:
    """A Markdown table for each data set: the test results at the rate that was chosen."""
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for each in runs.all:
        if each["study"] == "methods" and each["split"] == studies.TEST:
            data = each["data"] + (", products in bfloat16" if BF16 in each["settings"] else "")
            groups[data, each["metric"]][each["method"]].append(each)
    lines = []
    for (data, metric), methods in groups.items():
        factor, digits = (100, 2) if metric == "accuracy" else (1, 3)
        lines += [f"{data}:", "", f"| method | rate | {metric} | seeds | seconds | peak memory, MB |"]
        lines.append("|---|--:|--:|--:|--:|--:|")
        for method, name in NAMES.items():
            if found := methods.get(method):
                value = studies.spread([factor * each["value"] for each in found], digits)
                seconds = studies.spread([each["seconds"] for each in found], 0)
                rate = found[-1]["settings"].removeprefix("rate=").removesuffix(BF16)
                peak = max(each["megabytes"] for each in found)
                lines.append(f"| {name} | {rate} | {value} | {len(found)} | {seconds} | {peak:,} |")
        lines.append("")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    args = parse(words)
    if args.table:
        print(tables(studies.Runs(args.json)))
    else:
        run(args)


if __name__ == "__main__":
    main()

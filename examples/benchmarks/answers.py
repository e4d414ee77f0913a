"""Short answers of a small chat model: `hf-lora train` as it is, PEFT, and full fine-tuning.

    python examples/benchmarks/answers.py --methods hf_lora peft full    # household messages, answered with JSON
    python examples/benchmarks/answers.py --train-file train.csv --test-file test.csv --label-column category \\
        --per-class 10                                                   # texts, answered with their label

The base is SmolLM2-135M-Instruct, and each method makes --epochs passes over the training rows.

- `hf_lora`: `hf-lora train` without options, apart from `--options`.
- `full`: all weights trained on the documents of the same packed rows, so with the same steps.
- `peft`: r=16 on every linear layer, batches of 8. Both have a cosine schedule with 10 warm-up steps.

Greedy answers to the test rows: F1 of the fields, and exact matches. With `--validate`, the last fifth of the training
rows takes the place of the test set. Each run is appended to `--json`, and skipped if it is there already.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_lora import finetune, generate_texts, recommend
from hf_lora.evaluation.answers import exact_match, field_f1

sys.path.append(str(Path(__file__).parents[1]))  # for studies.py, smollm2.py and finetune_smollm2.py
import studies
from finetune_smollm2 import read
from smollm2 import NAME, base_folder

Chats = list[list[dict[str, str]]]
RATES = {"peft": 1e-3, "full": 1e-4}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies.add_files(parser, "label", required=False)
    parser.add_argument("--per-class", type=int, help="use the first rows of each label; default: all")
    parser.add_argument("--validate", action="store_true", help="test on training rows that are held out")
    parser.add_argument("--methods", nargs="+", choices=("hf_lora", "peft", "full"), default=["hf_lora"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=3, help="default: 3, as hf-lora train")
    parser.add_argument("--rate", type=float, help="learning rate of PEFT and of full fine-tuning")
    parser.add_argument("--options", nargs="*", default=[], help="further options of hf-lora train: NAME=VALUE")
    parser.add_argument("--limit", type=int, help="test rows that are used, drawn with seed 1; default: all")
    parser.add_argument("--json", type=Path, default=studies.RECORDS)
    return parser.parse_args(words)


def chat_of(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]


def chats(args: argparse.Namespace) -> tuple[Chats, Chats]:
    """Those that are trained on, and those that are evaluated."""
    if args.train_file:
        parts = studies.part_of(studies.labeled_rows(args), args.per_class, args.validate)
        train, test = ([chat_of(row) for row in part] for part in parts)
    else:
        train, test = read("train"), read("test")
        if args.validate:
            count = len(train) // 5
            train, test = train[:-count], train[-count:]
    if args.limit:
        test = random.Random(1).sample(test, args.limit)
    return train, test


def trained(args: argparse.Namespace, method: str, seed: int, folder: Path, train: Chats) -> tuple[Any, float]:
    """(the trained model, seconds)"""
    base, file = base_folder(), folder / "train.jsonl"
    Dataset.from_list([{"messages": chat} for chat in train]).to_json(file)
    given: dict[str, Any] = {
        "dtype": "float32", "seed": seed, "save_strategy": "no", "num_train_epochs": args.epochs,
    }  # fmt: skip
    if method == "hf_lora":
        options = dict(option.split("=", 1) for option in args.options)
        result = finetune({
            "model": str(base), "train_file": str(file), "output_dir": str(folder / "run"), **given, **options,
        })  # fmt: skip
        return result.model, result.seconds
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows: Any = [studies.answered(tokenizer, chat) for chat in train]
    collator: Any = DataCollatorForSeq2Seq(tokenizer)
    if method == "full":
        length = recommend(base, file, **given).arguments().get("max_length", 1024)
        rows, collator = studies.packed(rows, length), studies.Documents()
    else:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        str(folder), learning_rate=args.rate or RATES[method], lr_scheduler_type="cosine", warmup_steps=10,
        num_train_epochs=args.epochs, per_device_train_batch_size=8 if method == "peft" else 1, save_strategy="no",
        report_to="none", remove_unused_columns=False, seed=seed, logging_steps=10, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, collator, train_dataset=rows)
    start = time.perf_counter()
    trainer.train()
    return model, time.perf_counter() - start


def scores(args: argparse.Namespace, method: str, seed: int) -> tuple[dict[str, float], float]:
    """(the metrics, seconds) of a method."""
    train, test = chats(args)
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    with TemporaryDirectory() as folder:
        model, seconds = trained(args, method, seed, Path(folder), train)
    model.eval()
    prompts, references = [chat[:-1] for chat in test], [chat[-1]["content"] for chat in test]
    longest = max(len(tokenizer(text)["input_ids"]) for text in references)
    written = generate_texts(model, tokenizer, prompts, max_new_tokens=longest + 16, batch_size=24)
    pair = {"predictions": written, "references": references}
    found = {"exact match": exact_match(**pair)["exact_match"]}
    if not args.train_file:
        found["field F1"] = field_f1(**pair)["field_f1"]
    return found, seconds


def settings_of(args: argparse.Namespace, method: str) -> str:
    """What tells the runs of a method apart, in words; empty: its defaults."""
    own = sorted(args.options) if method == "hf_lora" else [f"rate={args.rate or RATES[method]:g}"]
    return " ".join([*own, *([f"epochs={args.epochs:g}"] if args.epochs != 3 else [])])


def main(words: list[str] | None = None) -> None:
    args = parse(words)
    runs = studies.Runs(args.json)
    name = f"{Path(args.train_file).resolve().parent.name}, answered" if args.train_file else "household"
    where = studies.place_of(args, "answers", name, NAME)
    for key in runs.missing(where, args.methods, args.seeds, partial(settings_of, args)):
        (found, seconds), megabytes = studies.alone(scores, args, key["method"], key["seed"])
        for metric, value in found.items():
            runs.add(key, metric, value, seconds, megabytes)
    for run in runs.all:
        if all(run.get(k) == v for k, v in where.items()):
            print(json.dumps({k: run[k] for k in ("method", "settings", "seed", "metric", "value", "seconds")}))


if __name__ == "__main__":
    main()

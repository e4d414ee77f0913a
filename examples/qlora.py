"""QLoRA: train an adapter over a 4-bit base, then merge it into the original bfloat16 base.

    python examples/qlora.py [--base FOLDER_OR_NAME] [--output out/qlora] [--steps 30]

Without --base it uses SmolLM2-135M-Instruct (see smollm2.py), and 30 steps take about ten minutes on a CPU. It prints
the loss on held-out rows of the 4-bit model with the unmerged adapter, and of the two ways to merge.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from finetune_smollm2 import read
from smollm2 import base_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DataCollatorForSeq2Seq

from hf_lora import LoraModel
from hf_lora import LoraTrainer as Trainer
from hf_lora import LoraTrainingArguments as TrainingArguments

NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16,  # so that FSDP2 can shard them
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a causal language model; default: SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=Path("out/qlora"))
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    base = options.base or str(base_folder())
    adapter = options.output / "adapter"

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=NF4, dtype=torch.bfloat16)
    train, test = ([encode(tokenizer, chat) for chat in read(name)] for name in ("train", "test"))
    collate = DataCollatorForSeq2Seq(tokenizer)
    args = TrainingArguments(
        str(options.output / "run"), lora_r=16, learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=5,
        max_steps=options.steps, per_device_train_batch_size=8, gradient_checkpointing=True, logging_steps=10,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = Trainer(model, args, collate, train, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(adapter))

    batch = dict(collate(test[:32]))
    losses = {"4-bit base, unmerged adapter": loss(trainer.model, batch)}
    # Recommended: merge the adapter into the base that was never rounded to 4 bits.
    merged = LoraModel.from_pretrained(adapter, base_model=base, merge=True, dtype=torch.bfloat16)
    merged.save_pretrained(options.output / "merged")
    tokenizer.save_pretrained(options.output / "merged")
    losses["merged into the bfloat16 base"] = loss(merged, batch)
    # Without the bfloat16 base: make the 4-bit model dense, with its rounded weights.
    losses["4-bit base made dense and merged"] = loss(trainer.model.merge_and_unload(), batch)
    for name, value in losses.items():
        print(f"{name:34} loss {value:.4f}")


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


@torch.no_grad()
def loss(model: Any, batch: dict[str, Any]) -> float:
    device = next(model.parameters()).device
    return float(model.eval()(**{k: v.to(device) for k, v in batch.items()}).loss)


if __name__ == "__main__":
    main()

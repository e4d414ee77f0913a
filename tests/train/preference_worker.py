"""Run by test_distributed_preference.py in one or two processes: DPO and embeddings with the same global batches."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from processes import leave
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses, modules
from tiny import OTHERS, TEXTS, adapter_values

from hf_lora import (
    LoraDPOConfig,
    LoraDPOTrainer,
    LoraSentenceTransformerTrainer,
    LoraSentenceTransformerTrainingArguments,
)

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
PAIRS = {"prompt": TEXTS, "chosen": [f" {text}" for text in OTHERS], "rejected": [f" {text}" for text in TEXTS]}


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4 // PROCESSES, "lora_r": 4,
        "learning_rate": 1e-2, "optim": "sgd", "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "bf16": False, "max_grad_norm": 0.0,
    }  # fmt: skip


def preference(base: Path, folder: Path) -> None:
    args = LoraDPOConfig(**settings(folder))
    trainer = LoraDPOTrainer(str(base / "llama"), args=args, train_dataset=Dataset.from_dict(PAIRS))
    finish(trainer, folder)


def embedding(base: Path, folder: Path) -> None:
    """With a dense module, and negatives from both processes."""
    torch.manual_seed(0)
    parts = [modules.Transformer(str(base / "bert")), modules.Pooling(32), modules.Dense(32, 16)]
    for layer in parts[0].modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    model = SentenceTransformer(modules=parts, device="cpu")
    loss = losses.MultipleNegativesRankingLoss(model, gather_across_devices=True)
    args = LoraSentenceTransformerTrainingArguments(**settings(folder) | {"learning_rate": 0.3})
    rows = Dataset.from_dict({"anchor": TEXTS, "positive": OTHERS})
    finish(LoraSentenceTransformerTrainer(model, args, train_dataset=rows, loss=loss), folder)


def finish(trainer: Any, folder: Path) -> None:
    start = adapter_values(trainer.model)
    trainer.train()
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(start, folder / "start.safetensors")
        save_file(adapter_values(trainer.model), folder / "end.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    base, folder = map(Path, sys.argv[1:])
    preference(base, folder / "preference")
    embedding(base, folder / "embedding")
    leave()

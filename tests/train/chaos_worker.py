"""Run by ckpt-chaos in test_chaos.py: a short training in a folder, from the newest complete checkpoint there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from tiny import texts, tiny_llama

from hf_lora import LoraTrainer, LoraTrainingArguments
from hf_lora.train.checkpoint.manifest import last_checkpoint


def main(folder: Path, *flags: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # files that hold the folder's name then have the same size in each folder
    torch.set_num_threads(1)
    args = LoraTrainingArguments(
        ".", max_steps=4, save_strategy="steps", save_steps=2, logging_steps=1, learning_rate=1e-2, lora_dropout=0.1,
        per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", "1")), report_to="none", use_cpu=True,
        disable_tqdm=True, enable_jit_checkpoint="--sigterm" in flags,
    )  # fmt: skip
    trainer = LoraTrainer(tiny_llama(), args, train_dataset=texts())
    start = last_checkpoint(".")
    print(f"resumed from step {0 if start is None else Path(start).name.removesuffix('.replaced').rpartition('-')[2]}")
    trainer.train(resume_from_checkpoint=start)
    trainer.save_model()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

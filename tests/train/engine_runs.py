"""What the test of the engines and its workers share: one model, one set of arguments, one way to write results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from helpers import randomize
from safetensors.torch import save_file
from tiny import tiny_llama

from hf_lora import LoraConfig, LoraTrainingArguments, apply_lora

STEPS = 20


def fresh_model(adapted: bool = True, bf16: bool = False, seed: int = 0) -> Any:
    model = tiny_llama()
    if bf16:
        model = model.to(torch.bfloat16)
    # r=3 and alpha=3: no tensor's first dimension is a multiple of the processes.
    return randomize(apply_lora(model, LoraConfig(r=3)), seed, 0.05) if adapted else model


def run_arguments(folder: Path, **values: Any) -> LoraTrainingArguments:
    values = {
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": STEPS, "save_strategy": "steps",
        "save_steps": 10, "logging_strategy": "no", "learning_rate": 1e-2, "adam_epsilon": 1e-4,
        "per_device_train_batch_size": 4, "frozen_head_loss": False, "seed": 0,
    } | values  # fmt: skip
    return LoraTrainingArguments(output_dir=str(folder), **values)


def write_result(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ.get("RANK", "0"))
    save_file(
        {name: t.detach().float().contiguous() for name, t in tensors.items()}, folder / f"end-{rank}.safetensors"
    )


def expect(file: Path, kind: type[Exception], call: Any) -> None:
    try:
        call()
    except kind as error:
        file.with_suffix(".txt").write_text(str(error))

"""Run by test_engine_methods.py: each method under FSDP2 or ZeRO through LoraTrainer; results go into a folder."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
import torch
import torch.distributed as dist
from engine_runs import run_arguments, write_result
from helpers import tiny_llama
from processes import leave
from tiny import texts

from hf_lora import LoraConfig, LoraTrainer, apply_lora, gathered_state

STEPS = 8
CONFIGS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora-embedding": {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
    "dora-pissa": {"use_dora": True, "init_lora_weights": "pissa"},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "lora_fa": {"method": "lora_fa"},
    "mica": {"init_lora_weights": "mica"},
    "alora": {"alora_invocation_tokens": [7, 8]},
    "eva": {"init_lora_weights": "eva", "eva_config": {"use_label_mask": False}},
    "corda": {"init_lora_weights": "corda"},
}
"""Name -> the fields of a configuration."""


def rows() -> Any:
    data = texts()
    for row in data.rows:
        row["input_ids"][3:5] = torch.tensor([7, 8])
    return data


def train(cls: Any, name: str, folder: Path) -> Any:
    config = LoraConfig(r=3, **CONFIGS[name])
    torch.manual_seed(0)
    looks = name in ("eva", "corda")
    model = tiny_llama() if looks else apply_lora(tiny_llama(), config)
    args = run_arguments(folder / name, max_steps=STEPS, save_steps=STEPS, lora_init_batches=3)
    trainer = cls(model, args, train_dataset=rows(), **({"lora_config": config} if looks else {}))
    trainer.train()
    write_result(folder / name, gathered_state(trainer._bare_model))
    return trainer


def main(engine: str, out: Path) -> None:
    if engine == "ddp":
        cls: Any = LoraTrainer
    elif engine == "fsdp":
        cls = importlib.import_module("engines_worker").FsdpTrainer
    else:
        worker = importlib.import_module("zero_worker")
        cls = {"zero3": worker.ZeroTrainer, "zero2": worker.ZeroTwo}[engine]
    for name in CONFIGS if engine != "ddp" else ("eva", "corda"):
        train(cls, name, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1].startswith("zero"):
        vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
        dist.init_process_group("gloo")
    main(sys.argv[1], Path(sys.argv[2]))
    leave()

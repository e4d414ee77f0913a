"""What the test of the engines and its workers share: one model, one set of arguments, one way to write results."""

from __future__ import annotations

import os
import subprocess
import sys
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


def start(script: str, *words: Any, processes: int = 2, **environment: str) -> subprocess.Popen[str]:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv_backend=c10d",
               "--rdzv_endpoint=127.0.0.1:0", str(here / script), *map(str, words)]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": paths,
        **environment,
    }
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

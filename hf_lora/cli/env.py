"""`hf-lora env`: versions, devices and settings, for bug reports."""

from __future__ import annotations

import os
import platform
import sys

import typer

from .. import __version__

SETTINGS = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT",
            "TRANSFORMERS_VERBOSITY", "ACCELERATE_USE_CPU", "WORLD_SIZE")  # fmt: skip
"""Environment variables that change what a command does; tokens are never shown."""
OPTIONAL = (
    "peft",
    "trl",
    "datasets",
    "bitsandbytes",
    "torchao",
    "deepspeed",
    "evaluate",
    "tokenizers",
    "numpy",
    "typer",
)


def register(app: typer.Typer) -> None:
    """Add this file's command to `app`."""
    app.command()(env)


def env() -> None:
    """Show versions, devices and settings, to paste into a bug report."""
    import torch

    from ..versions import NEEDED, installed

    lines = [("hf_lora", __version__), ("Python", sys.version.split()[0]), ("system", platform.platform())]
    found = {name: installed(name) or "not installed" for name in (*NEEDED, *OPTIONAL)}
    lines += ({**found, "torch": torch.__version__}).items()  # with the build
    lines += _device()
    lines += [(name, os.environ[name]) for name in SETTINGS if name in os.environ]
    width = max(len(name) for name, _ in lines)
    typer.echo("\n".join(f"{name:<{width}}  {value}" for name, value in lines))


def _device() -> list[tuple[str, str]]:
    import torch

    place = torch.accelerator.current_accelerator(check_available=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [("cores", f"{cores}, {torch.get_num_threads()} threads")]
    if place is None:
        return [*lines, ("device", "cpu"), ("dtype of products", "the base's; --bf16 for autocast")]
    count = torch.accelerator.device_count()
    lines.append(("device", f"{count} x {_name_of(place.type)}"))
    if place.type == "cuda":
        lines.append(
            ("bfloat16", "supported" if torch.cuda.is_bf16_supported(including_emulation=False) else "emulated")
        )
    return lines


def _name_of(kind: str) -> str:
    import torch

    if kind != "cuda":
        return kind
    memory = torch.cuda.get_device_properties(0).total_memory
    return f"{torch.cuda.get_device_name(0)} ({memory / 2**30:.0f} GiB)"

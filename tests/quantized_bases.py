"""One tiny language model, quantized in each way that runs on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from torch import Tensor

BITSANDBYTES = ["nf4", "nf4-double", "fp4", "int8"]
TORCHAO = ["torchao-int8", "torchao-int4"]
QUANTIZED = BITSANDBYTES + TORCHAO


def available(kind: str) -> None:
    """Skip where the backend is not installed."""
    if kind in BITSANDBYTES:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if kind in TORCHAO:
        pytest.importorskip("torchao", reason="torchao is not installed")


def method(kind: str, **more: Any) -> Any:
    """The `quantization_config` of a kind; None for "dense"."""
    if kind == "dense":
        return None
    available(kind)
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **more)
    if kind in BITSANDBYTES:
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind.partition("-")[0], bnb_4bit_use_double_quant="double" in kind,
            **{"bnb_4bit_compute_dtype": torch.float32} | more,
        )  # fmt: skip
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    # torchao's Int4WeightOnlyConfig packs for a GPU's kernels; this is its form of the same numbers for any device.
    four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "torchao-int8" else four, **more)


def save_base(folder: Path, **config: Any) -> Path:
    # bitsandbytes takes wrong scales on some CPUs where the width is no multiple of its blocks of 64.
    tiny_llama(**dict(hidden_size=64, intermediate_size=128) | config).save_pretrained(folder)
    return folder


def load(folder: Path, kind: str, dtype: Any = torch.float32, cls: Any = None, **more: Any) -> Any:
    from transformers import LlamaForCausalLM

    return (cls or LlamaForCausalLM).from_pretrained(
        folder, quantization_config=method(kind, **more), dtype=dtype, device_map="cpu"
    )


def bits(model: Any) -> dict[str, Tensor]:
    """A copy of every parameter and buffer by name; of torchao's tensors, of what they hold."""
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        parts = {"": tensor.detach()}
        if hasattr(tensor, "qdata"):
            parts = {f".{part}": getattr(tensor, part) for part in ("qdata", "scale", "zero_point")}
        found |= {name + part: held.clone() for part, held in parts.items() if held is not None}
    return found

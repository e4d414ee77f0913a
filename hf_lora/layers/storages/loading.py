"""The options with which transformers loads a base with quantized weights."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from .bnb import BITSANDBYTES

BITS = {4: 4.127, 8: 8.0}
"""Bits of a loaded weight -> bits per value in memory, with the scales of its blocks."""


def why_not_loadable() -> str | None:
    """Why weights cannot be quantized when they are loaded; None if they can."""
    if find_spec(BITSANDBYTES) is None:
        return f'it needs {BITSANDBYTES}, which is not installed. Run: pip install "hf_lora[quant]"'
    return None


def quantized_loading(
    bits: int, dtype: torch.dtype, device: torch.device, dense: Sequence[str] | None
) -> dict[str, Any]:
    """The arguments of `from_pretrained`.

    Args:
        bits: 4 (NF4 with double quantization) or 8.
        dtype: of the other weights, and of products.
        dense: modules that stay dense; None: the output embedding.
    """
    from transformers import BitsAndBytesConfig

    skipped = {} if dense is None else {"llm_int8_skip_modules": list(dense)}
    if bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True, **skipped)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype, **skipped,
        )  # fmt: skip
    return {"quantization_config": config, "dtype": dtype, "device_map": {"": device}}

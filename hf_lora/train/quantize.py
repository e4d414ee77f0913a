"""A base whose weights are quantized when it is loaded: `--load-in-4bit` and `--load-in-8bit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ..adapt.embeddings import output_embedding
from ..adapt.heads import find_heads
from ..adapt.inner import adapted_part
from ..errors import ConfigError, Faults
from ..layers.storages import is_packed, is_unfinished
from ..layers.storages.loading import BITS, quantized_loading, why_not_loadable
from .parsing import RunArguments


def bits_of(run: RunArguments) -> int | None:
    """The bits of a loaded weight; None: the base is loaded as it is."""
    return 4 if run.load_in_4bit else 8 if run.load_in_8bit else None


def check_quantization(run: RunArguments, faults: Faults) -> None:
    """Add a fault if the base cannot be quantized."""
    if run.load_in_4bit and run.load_in_8bit:
        faults.add("--load-in-4bit and --load-in-8bit contradict each other: pass only one")
    elif bits := bits_of(run):
        reason = why_not_loadable()
        if reason is not None:
            faults.add(f"--load-in-{bits}bit: {reason}")


def why_not_quantizable(run: RunArguments, config: PretrainedConfig) -> str | None:
    """Why the weights of a base cannot be quantized; None if they can, or need not."""
    if bits_of(run) is None or getattr(config, "quantization_config", None) is None:
        return None
    return f"--model {run.model} is quantized already: omit --load-in-{bits_of(run)}bit"


def dtype_of(wanted: str | None, config: PretrainedConfig) -> torch.dtype:
    """The dtype that the weights are loaded in."""
    if wanted not in (None, "auto"):
        return getattr(torch, str(wanted).removeprefix("torch."))
    return getattr(config, "dtype", None) or torch.float32


def load_quantized(
    load: Callable[[dict[str, Any]], Any],
    run: RunArguments,
    config: PretrainedConfig,
    device: torch.device,
    whole: Callable[[nn.Module], Sequence[str]],
) -> Any:
    """A base with quantized weights; modules that are trained whole, and all that its checkpoint lacks, stay dense.

    Args:
        load: loads the base with further options of `from_pretrained`.
        whole: of a base, the modules that are trained whole.
    """
    bits = bits_of(run)
    assert bits is not None

    def loaded(dense: Sequence[str] | None) -> Any:
        return load(quantized_loading(bits, dtype_of(run.dtype, config), device, dense))

    result = loaded(None)
    model = adapted_part(result[0] if isinstance(result, tuple) else result)
    if not any(map(is_packed, model.parameters())):
        raise ConfigError(
            f"hf-lora train: --load-in-{bits}bit: {type(model).__name__} has no linear layer that can be quantized. "
            "Omit it."
        )
    dense = list(dict.fromkeys([*whole(model), *find_heads(model)]))
    if not any(_is_quantized(model.get_submodule(name)) for name in dense):
        return result
    head = output_embedding(model)
    return loaded([*dense, *(name for name, module in model.named_modules() if module is head)])


def _is_quantized(module: nn.Module) -> bool:
    return any(is_unfinished(m) for m in module.modules()) or any(is_packed(p) for p in module.parameters())


def quantized_bytes(model: nn.Module, bits: int) -> int:
    """The bytes of the frozen weights of a dense model, as they would be after loading."""
    head = output_embedding(model)
    total = 0
    for module in model.modules():
        is_packed_later = isinstance(module, nn.Linear) and module is not head
        for name, p in module.named_parameters(recurse=False):
            packed = is_packed_later and name == "weight" and not p.requires_grad
            total += int(p.numel() * (BITS[bits] / 8 if packed else p.element_size()))
    return total

"""Small tensor operations that the layers share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def working(x: Tensor) -> Tensor:
    """`x` in the dtype that products with it run in: autocast's where autocast is on, else its own.

    Casting here once lets the base product and the adapter's share the copy that autocast would make for each.
    Autocast leaves float64 alone, and so do we.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def weight_like(weight: Tensor, x: Tensor) -> Tensor:
    """The float32 master `weight` in the dtype of `x`; autocast, where it is on, casts and caches by itself.

    A factor that was offloaded after it was made is on meta, and a product with it is garbage; moving it raises.
    """
    if weight.dtype == x.dtype and weight.device == x.device:
        return weight  # the common case, asked first: at one token a step each call counts
    return weight.to(x.device) if torch.is_autocast_enabled(x.device.type) else weight.to(x.device, x.dtype)


def exact(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype that updates are folded in: float64, so that a sum that nearly cancels is right too."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)  # MPS has no float64


def dropout(x: Tensor, p: float) -> tuple[Tensor, float]:
    """`x` with elements dropped with probability `p`, and the gain that keeps its mean, for where it is cheap.

    On CPU four mask elements come from each random 64-bit word, and a byte an element is kept for the backward, where
    PyTorch draws a number for each and keeps a mask as large as x. The probability is then a multiple of 2^-16.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p), 1.0
    dropped = round(p * 65536)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
    return x * keep, 65536 / (65536 - dropped)


def used_devices() -> list[int]:
    """The CUDA devices whose random state is in use, for `torch.random.fork_rng`."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def device_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of `nn.Module._apply` with its moves kept and its casts undone, so that float32 masters stay float32."""

    def move(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return move

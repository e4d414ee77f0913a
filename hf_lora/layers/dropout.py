"""Dropout whose cost, in time and in memory for the backward, is proportional to the number of dropped elements.

If each element is dropped with probability p, the distances between dropped elements are independent geometric
variables. A mask is drawn as such distances: at p = 0.05, one random number and one saved byte for every twenty
elements, where PyTorch's dropout on a CPU draws a number and saves a mask entry for each. On other devices, whose
generators are fast, a mask is a seed and is drawn again when needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SPARSE = 0.5
"""Above this probability a mask of all elements is cheaper than distances."""
_CUT = 1e-5
"""Largest probability that a distance exceeds its dtype's range; it is clamped, which drops one more element."""


def draw_mask(x: Tensor, p: float) -> Tensor:
    """Choose the elements of `x` to drop, each with probability `p`, in the form that `dropped_indices` reads.

    It uses PyTorch's CPU generator, so it is reproducible with `manual_seed`, and when activation checkpointing
    restores the random state to run a forward again.

    Returns:
        On a CPU, the distances between dropped elements of the flat x (uint8, int16 or int32); else a seed (int64).
    """
    if x.device.type != "cpu" or p > _SPARSE:
        return torch.empty((), dtype=torch.int64).random_(0, None)
    kinds = (torch.uint8, torch.int16, torch.int32)
    dtype = next(d for d in kinds if (1 - p) ** torch.iinfo(d).max < _CUT or d == torch.int32)
    mean = p * x.numel()
    size = int(mean + 7 * mean**0.5) + 8  # once in 10^12 draws they end before the tensor does
    distances = torch.empty(size, dtype=torch.float32)  # whatever the default dtype is
    longest = min(torch.iinfo(dtype).max - 1, 2**31 - 256)  # plus 1, exact in float32
    distances.uniform_(2**-25, 1).log_().mul_(1 / math.log1p(-p)).clamp_(max=longest).add_(1)
    return distances.to(dtype)


def dropped_indices(mask: Tensor, x: Tensor, p: float) -> Tensor:
    """The elements that `draw_mask(x, p)` chose: sorted indices into the flat x (int64), or a mask like x (bool)."""
    if mask.dtype == torch.int64:
        generator = torch.Generator(x.device).manual_seed(int(mask))
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(p, generator=generator)
    places = mask.cumsum(0).sub_(1)
    return places[: int(torch.searchsorted(places, x.numel()))]


def drop_(x: Tensor, places: Tensor) -> Tensor:
    """Set the elements at `places` to zero in the contiguous `x`, in place; the others are not scaled up."""
    if places.dtype == torch.bool:
        return x.masked_fill_(places, 0)
    x.view(-1).put_(places, x.new_zeros(1).expand(places.numel()))
    return x


def dropped(x: Tensor, places: Tensor) -> Tensor:
    """A copy of `x` with the elements at `places` set to zero."""
    return drop_(x.clone(memory_format=torch.contiguous_format), places)

"""Dropout whose mask is drawn again for the backward instead of being kept.

A mask is a seed here. Drawing it costs in proportion to what is dropped, not to what is kept: along the flat tensor,
one unit of length an element, runs a Poisson process of rate -ln(1 - p), whose gaps are exponential. The numbers of
its points in different elements are independent, and an element has none with probability 1 - p. At p = 0.05 that is
one random number for every twenty elements, where PyTorch's dropout on a CPU draws one for each; and the points come
in order, so that writing to them goes through memory once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SPARSE = 0.5
"""Above this probability a mask of all elements is cheaper than a list of the dropped ones."""


def draw_seed() -> int:
    """A seed from PyTorch's own CPU generator: the same under the same `manual_seed`, and when activation
    checkpointing restores the random state to run a forward again."""
    return int(torch.empty((), dtype=torch.int64).random_(0, None))


def draw_mask(x: Tensor, p: float, seed: int) -> Tensor:
    """Which elements of `x` to drop, each with probability `p`: the same for the same seed, shape and device.

    Returns:
        Sorted indices into the flat x (int64, some of them repeated), or where that is slower a mask like x (bool).
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    if x.device.type == "cpu" and p <= _SPARSE:
        rate, length = -math.log1p(-p), x.numel()
        points = rate * length
        uniform = torch.empty(int(points + 7 * points**0.5) + 8)  # one time in 10^12 it ends before the tensor does
        gaps = uniform.uniform_(2**-25, 1, generator=generator).log_()  # times -1 / rate, which can wait
        places = gaps.cumsum(0, dtype=torch.float64).mul_(-1 / rate).to(torch.int64)
        return places[: int(torch.searchsorted(places, length))]
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(p, generator=generator)


def drop_(x: Tensor, mask: Tensor) -> Tensor:
    """Set what `mask` says to zero, in the contiguous `x` itself; the others are not scaled up."""
    if mask.dtype == torch.bool:
        return x.masked_fill_(mask, 0)
    x.view(-1).put_(mask, x.new_zeros(1).expand(mask.numel()))
    return x


def dropped(x: Tensor, mask: Tensor) -> Tensor:
    """A copy of `x` in which what `mask` says is zero."""
    return drop_(x.clone(memory_format=torch.contiguous_format), mask)

"""Dropout whose mask is drawn again for the backward instead of being kept.

A mask is a seed here. Drawing it costs in proportion to what is dropped, not to what is kept: elements to drop are
picked at random with repetition, as many as a Poisson variable of mean -ln(1 - p) an element says. Then the number of
picks that fall on an element is a Poisson variable of that mean, independent of all others, so it is spared with
probability 1 - p exactly (the splitting property of the Poisson process). At p = 0.05 that is one random number for
every twenty elements, where PyTorch's dropout on a CPU draws one for each.
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
        Indices into the flat x (int64, some of them more than once), or where that is slower a mask like x (bool).
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    if x.device.type == "cpu" and p <= _SPARSE:
        mean = torch.tensor(-math.log1p(-p) * x.numel(), dtype=torch.float64)
        picks = int(torch.poisson(mean, generator=generator))
        return torch.empty(picks, dtype=torch.int64).random_(0, max(1, x.numel()), generator=generator)
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

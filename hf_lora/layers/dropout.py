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


def drop_(x: Tensor, p: float, seed: int) -> Tensor:
    """Set elements of the contiguous `x` to zero in place, each with probability `p`; the others are not scaled up.

    The same seed, shape and device drop the same elements.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    if x.device.type == "cpu" and p <= _SPARSE:
        mean = torch.tensor(-math.log1p(-p) * x.numel(), dtype=torch.float64)
        picks = int(torch.poisson(mean, generator=generator))
        places = torch.empty(picks, dtype=torch.int64).random_(0, max(1, x.numel()), generator=generator)
        x.view(-1).put_(places, x.new_zeros(1).expand(picks))
        return x
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
    return x.mul_(keep)


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """A copy of `x` with elements set to zero, as `drop_` does."""
    return drop_(x.clone(memory_format=torch.contiguous_format), p, seed)

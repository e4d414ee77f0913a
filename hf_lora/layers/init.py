"""Initial values of the factors: one function an initialisation.

Each takes the layer's shape class and the two shapes, and returns A and B in float32. The draws come from PyTorch's
global generator, as all of a model's initial values do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .base import Shape

Init = Callable[[Shape, tuple[int, ...], tuple[int, ...], torch.device], tuple[Tensor, Tensor]]


def kaiming(shape: Shape, a: tuple[int, ...], b: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """A Kaiming-uniform and B zero; of an embedding, whose A is looked up and not multiplied, A zero and B normal."""
    a_, b_ = _zeros(a, device), _zeros(b, device)
    if shape.takes_dropout:
        nn.init.kaiming_uniform_(a_, a=math.sqrt(5))
    else:
        nn.init.normal_(b_)
    return a_, b_


def gaussian(shape: Shape, a: tuple[int, ...], b: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """A normal with deviation 1/r and B zero; of an embedding A zero and B normal."""
    if not shape.takes_dropout:
        return kaiming(shape, a, b, device)
    return nn.init.normal_(_zeros(a, device), std=1 / a[0]), _zeros(b, device)


def random(shape: Shape, a: tuple[int, ...], b: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Both random: the adapter changes the model at once. For tests."""
    a_, b_ = _zeros(a, device), _zeros(b, device)
    if shape.takes_dropout:
        return nn.init.kaiming_uniform_(a_, a=math.sqrt(5)), nn.init.kaiming_uniform_(b_, a=math.sqrt(5))
    return nn.init.normal_(a_), nn.init.normal_(b_)


def unset(shape: Shape, a: tuple[int, ...], b: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory alone, and no draw: for factors that a file fills at once."""
    return torch.empty(a, device=device, dtype=torch.float32), torch.empty(b, device=device, dtype=torch.float32)


INITS: dict[bool | str, Init] = {True: kaiming, "gaussian": gaussian, False: random}


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=device)

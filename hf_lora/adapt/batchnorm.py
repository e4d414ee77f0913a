"""Frozen BatchNorm: its running statistics are the base's, and in no adapter's file."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def hold_batchnorm(model: nn.Module) -> None:
    """Put every BatchNorm of which nothing is trained in eval mode."""
    for module in model.modules():
        own = (p for p in module._parameters.values() if p is not None)  # a bias of an adapter's is in a child
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in own):
            module.eval()

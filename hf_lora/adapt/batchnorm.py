"""Frozen BatchNorm: its running statistics belong to the base and are not saved with adapters."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def hold_batchnorm(model: nn.Module) -> None:
    """Set every BatchNorm without trained parameters to eval mode."""
    for module in model.modules():
        parameters = (p for p in module._parameters.values() if p is not None)  # an adapter's bias is in a child
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in parameters):
            module.eval()

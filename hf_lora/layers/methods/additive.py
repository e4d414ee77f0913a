"""Plain LoRA (Hu et al. 2021, arXiv:2106.09685): y = W x + scaling · B A x, W' = W + scaling · B A."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base import Method
from ..ops import dropout, working


class Additive(Method):
    kind = "lora"
    additive = True

    def forward(self, layer: Any, x: Tensor, names: tuple[str, ...]) -> Tensor:
        state = layer._lora
        x = working(x)
        y: Tensor = layer.product(x)
        for name in names:
            p, scaling = state.dropout[name], state.scaling[name]
            if p and layer.training:
                dropped, gain = dropout(x, p)
                update = state.shape.update(layer, name, dropped, scaling * gain)
            elif torch.is_grad_enabled():
                update = state.shape.update(layer, name, x, scaling)  # scaled where it is R wide, backwards too
            else:
                # At one token a step an operation more costs what the products do.
                y = torch.add(y, state.shape.update(layer, name, x).to(y.dtype), alpha=scaling)
                continue
            y = y + update.to(y.dtype)
        return y

    def fold(self, layer: Any, block: Tensor, names: tuple[str, ...], rows: slice) -> Tensor:
        state = layer._lora
        for name in names:
            block.add_(state.shape.delta(layer, name, rows), alpha=state.scaling[name])
        return block


ADDITIVE = Additive()

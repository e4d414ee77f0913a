"""DoRA (Liu et al. 2024, arXiv:2402.09353): W' = m ∘ V / ‖V‖ with V = W + scaling · B A and a norm for each output.

As in section 4.3 of the paper, the norm is a constant in the backward. It is computed from the factors: ‖W‖ of the
frozen base is cached, and W Aᵀ is (O, R), so no matrix as large as W is formed. With dropout, only the input of A is
dropped, as in plain LoRA; PEFT also drops that of W, and multiplies by W twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import StateError
from ..contract import AdaptedLayer, FactorSpec, Shape, Update
from ..ops import can_use_functions, lasting, scale_outputs, to_float64, version_of
from ..storages import quantization_of, why_unreadable
from .additive import Additive

MAGNITUDE = "lora_magnitude_vector"
BLOCK_ELEMENTS = 1 << 18
"""Elements of a block of rows in which a weight is read."""


class Dora(Additive):
    kind = "dora"
    keys = {MAGNITUDE: MAGNITUDE}
    additive = False

    def factors(self, layer: nn.Module, shape: Shape, r: int) -> dict[str, FactorSpec]:
        specs = shape.specs(layer, r)
        outputs, axes = shape.features(layer)[1], len(specs["lora_A"].shape) - 2
        if axes:  # as in PEFT, the magnitude of a convolution has the axes of its output
            return {**specs, MAGNITUDE: FactorSpec((1, outputs, *[1] * axes), MAGNITUDE)}
        return {**specs, MAGNITUDE: FactorSpec((outputs,), MAGNITUDE, "O")}

    def refuse(self, layer: Any, shape: Shape) -> str | None:
        storage = quantization_of(layer) if isinstance(layer, nn.Module) else None
        if storage is not None and not storage.readable:
            return f"DoRA needs the norm of the weight, and {why_unreadable(layer)}"
        return shape.refuse_folding(layer)

    def refuse_resizing(self, layer: AdaptedLayer) -> str | None:
        if layer._lora.shape.by_input:
            return "the norms of DoRA run over the vocabulary, so new rows would change what the other tokens give"
        return None

    def start(self, layer: AdaptedLayer, name: str) -> dict[str, Tensor]:
        norms = self._exact_norms(layer, name).to(torch.float32)
        return {MAGNITUDE: norms.view(layer._lora.adapters[name].specs[MAGNITUDE].shape)}

    def forward(self, layer: AdaptedLayer, x: Tensor, names: tuple[str, ...]) -> Tensor:
        (name,) = names
        y = super().forward(layer, x, names)
        on_output = layer._lora.shape.on_output
        change = _quotient(layer.factor(MAGNITUDE, name).flatten(), _norms(layer, name, y.dtype)) - 1
        bias = getattr(layer, "bias", None)
        return scale_outputs(y, on_output(layer, change), None if bias is None else on_output(layer, bias))

    def folding(self, layer: AdaptedLayer, names: tuple[str, ...]) -> Update:
        (name,) = names
        shape, add = layer._lora.shape, super().folding(layer, names)
        magnitude = to_float64(layer.factor(MAGNITUDE, name).detach().flatten())
        gains = _quotient(magnitude, self._exact_norms(layer, name)) if shape.by_input else magnitude.clone()

        def fold(block: Tensor, rows: slice) -> Tensor:
            block = add(block, rows)
            if not shape.by_input:  # the rows of a block are all weights of their outputs
                gains[rows] = _quotient(magnitude[rows], to_float64(block.flatten(1).norm(dim=1)))
            return block.mul_(shape.on_weight(layer, gains.to(block.dtype), rows))

        return fold

    @torch.no_grad()
    def _exact_norms(self, layer: AdaptedLayer, name: str) -> Tensor:
        """‖V‖ of each output (O,) in float64, from the whole matrix V, block by block."""
        add = super().folding(layer, (name,))
        squares = (_squares(layer, add(block, rows)) for rows, block in _blocks(layer))
        return _join(layer, squares).sqrt()


@torch.no_grad()
def _norms(layer: AdaptedLayer, name: str, dtype: torch.dtype) -> Tensor:
    """‖V‖ of each output (O,) in float32, from the factors; in evaluation, cached until a factor changes.

    Args:
        dtype: what a quantized layer multiplies in.
    """
    state = layer._lora
    cached = not layer.training and can_use_functions()
    key = [_identity(layer.weight), *(_identity(f.weight) for _, f in layer.factors(name))] if cached else []
    kept = state.evaluated.get(name) if cached else None
    if kept is not None and kept[0] == key and kept[1].device == layer.factor(MAGNITUDE, name).device:
        norms: Tensor = kept[1]
        return norms
    left, right = layer.matrices(name)
    if state.shape.by_input:
        left, right = right.t(), left.t()
    scaling, base = state.adapters[name].scaling, _base_squares(layer.whole(), left.device)
    with torch.autocast(left.device.type, enabled=False):
        crossed = _times_weight(layer.whole(), right, dtype).to(left.dtype).mul(left).sum(1)
        squared = (left @ (right @ right.t())).mul(left).sum(1)
    norms = (base + 2 * scaling * crossed + scaling**2 * squared).clamp_min(0).sqrt().to(torch.float32)
    if cached and (kept_norms := lasting(norms)) is not None:
        state.evaluated[name] = key, kept_norms
    return norms


def _times_weight(layer: AdaptedLayer, right: Tensor, dtype: torch.dtype) -> Tensor:
    """W rightᵀ (O, R) for a matrix `right` (R, I), in the dtype of the layer's products."""
    shape = layer._lora.shape
    if not shape.is_matrix:
        blocks = ((rows, block.flatten(1)) for rows, block in _blocks(layer, torch.float32))
        if shape.by_input:
            return torch.stack([block.t() @ right[:, rows].t() for rows, block in blocks]).sum(0)
        return torch.cat([block @ right.t() for _, block in blocks])
    if not layer._lora.storage.quantized:
        dtype = layer.weight.dtype
    right = right.to(dtype)
    weight = shape.weight(layer, right)
    if weight is not None:
        return F.linear(weight, right)
    y, bias = layer.product(right), layer.bias
    return (y if bias is None else y - bias).t()


def _base_squares(layer: AdaptedLayer, device: torch.device) -> Tensor:
    """‖W‖² of each output (O,) in float64. W is frozen: it is read once, and again after it was changed or moved."""
    derived = layer._lora.derived
    version = None if torch.compiler.is_compiling() else _identity(layer.weight)
    kept = derived.get("squares")
    if kept is None or (version is not None and kept[0] != version):
        kept = version, _join(layer, (_squares(layer, block) for _, block in _blocks(layer)))
        if (squares := lasting(kept[1])) is not None:
            derived["squares"] = version, squares
    found: Tensor = kept[1]
    return found.to(device)


def _blocks(layer: AdaptedLayer, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
    """(rows, block) of the weight; default: in float64.

    Raises:
        StateError: the weight is not in memory.
    """
    storage = layer._lora.storage
    count, *rest = storage.shape(layer)
    step = storage.block_rows(layer, max(1, BLOCK_ELEMENTS // max(1, torch.Size(rest).numel())))
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        block = layer.read(rows)
        if block.is_meta:
            break
        yield rows, (to_float64(block) if dtype is None else block.to(dtype)).contiguous()
    else:
        if count:
            return
    raise StateError(
        "DoRA reads the layer's weight, which is offloaded, partitioned by ZeRO-3, or assembled from several tensors "
        "of a file. Load the base into memory, without a device_map, and apply DoRA before it is partitioned."
    )


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """What differs after `tensor` was replaced or changed in place, except through its `data`."""
    return id(tensor), version_of(tensor), tensor.shape


def _squares(layer: AdaptedLayer, block: Tensor) -> Tensor:
    """The sums of squares of the rows of a block, or of its columns if these are the outputs."""
    return block.flatten(1).square().sum(0 if layer._lora.shape.by_input else 1)


def _join(layer: AdaptedLayer, squares: Iterator[Tensor]) -> Tensor:
    """The sums of squares of all outputs (O,), from those of the blocks."""
    return sum(squares, start=torch.zeros(())) if layer._lora.shape.by_input else torch.cat(list(squares))


def _quotient(magnitude: Tensor, norms: Tensor) -> Tensor:
    """m / ‖V‖, and 1 for an output whose weights are all zero, which gives zero in any case."""
    some = norms > 0
    return torch.where(some, magnitude / torch.where(some, norms, 1), 1)

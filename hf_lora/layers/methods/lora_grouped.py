"""LoRA whose update of a grouped convolution stays in its groups, so that it can be merged.

PEFT's A reads the inputs of all groups, which no grouped weight can represent. Here, the part of A that belongs to a
group reads the inputs of that group. Files hold A in PEFT's form, with zeros between the groups, so PEFT computes the
same. On other layers it is plain LoRA.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ...errors import AdapterFileError
from ..contract import AdaptedLayer, FactorSpec, Shape
from .additive import Additive


class LoraGrouped(Additive):
    kind = "lora_grouped"

    def factors(self, layer: nn.Module, shape: Shape, r: int) -> dict[str, FactorSpec]:
        specs, groups = shape.specs(layer, r), shape.groups(layer)
        if groups == 1:
            return specs
        a = specs["lora_A"]
        own = (r, a.shape[1] // groups, *a.shape[2:])
        layout = {"to_disk": partial(_between_groups, groups), "from_disk": partial(_within_groups, groups)}
        return {**specs, "lora_A": replace(a, shape=own, **layout)}  # type: ignore[arg-type]

    def refuse_folding(self, layer: AdaptedLayer) -> str | None:
        return None


def _between_groups(groups: int, a: Tensor) -> Tensor:
    """A (R, I / groups, …) as PEFT's A (R, I, …), with zeros for the inputs of other groups."""
    whole = a.new_zeros(a.shape[0], a.shape[1] * groups, *a.shape[2:])
    rows = a.shape[0] // groups
    for i, part in enumerate(a.split(rows)):
        whole[i * rows : (i + 1) * rows, i * a.shape[1] : (i + 1) * a.shape[1]] = part
    return whole


def _within_groups(groups: int, whole: Tensor) -> Tensor:
    """The reverse.

    Raises:
        AdapterFileError: A reads inputs of other groups.
    """
    blocks = (part.chunk(groups, 1)[i] for i, part in enumerate(whole.chunk(groups)))
    a = torch.cat(list(blocks))
    if not whole.is_meta and whole.count_nonzero() != a.count_nonzero():
        raise AdapterFileError(
            "A factor A of a grouped convolution reads the inputs of other groups, as if PEFT had trained it, but "
            "hf_lora.json says method='lora_grouped'. Remove hf_lora.json to load the adapter as plain LoRA."
        )
    return a

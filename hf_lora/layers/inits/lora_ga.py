"""LoRA-GA (Wang et al. 2024, arXiv:2407.05000): A and B from the gradient of the weight over some batches.

The product is subtracted from the base, which itself does not change: see `Init.takes_out`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..contract import Shape
from ..storages import quantization_of
from .base import Init, InitCall
from .batches import Run
from .decompositions import refuse_few_directions, refuse_others, subtracted

CHOICES = {
    "direction": ("ArBr", "A2rBr", "ArB2r", "random"),
    "scale": ("stable", "weight_svd", "gd_scale", "unit"),
}


class LoraGA(Init):
    """B and A are singular vectors of the gradient, those of B times their singular values.

    `lora_ga_config` has PEFT's settings. direction: which of the 2 R largest each gets; `"ArB2r"`: A the first R, B
    the next. scale: of B; `"stable"`: O^¼ / √stable_gamma.
    """

    takes_out = True
    repeatable = False
    needs: ClassVar[Literal["gradients"]] = "gradients"
    settings: Mapping[str, Any] = {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16}

    def refuse(self, layer: Any, shape: Shape) -> str | None:
        if quantization_of(layer) is not None:
            return "a quantized weight has no gradient"
        return super().refuse(layer, shape) or refuse_others(shape)

    def refuse_rank(self, layer: Any, shape: Shape, r: int) -> str | None:
        return refuse_few_directions(layer, shape, 2 * r)

    def refuse_settings(self, values: Mapping[str, Any]) -> str | None:
        for name, known in CHOICES.items():
            if values.get(name, known[0]) not in known:
                return f"{name}={values[name]!r} must be one of {', '.join(known)}"
        gamma = values.get("stable_gamma", 16)
        if not isinstance(gamma, (int, float)) or gamma <= 0:
            return f"stable_gamma={gamma!r} must be a positive number"
        return super().refuse_settings(values)

    def observe(self, run: Run) -> dict[str, dict[str, Tensor]]:
        """Name of a site -> its A and B."""
        batches = run.kept()
        sizes = {name: 4 * call.layer.weight.numel() for name, call in run.calls.items()}
        found: dict[str, dict[str, Tensor]] = {}
        for group in run.groups(sizes):
            sums: dict[str, Tensor] = {}
            for batch in run.shown(batches):
                for name, grad in zip(group, run.forward(batch, group), strict=True):
                    if grad is not None:
                        sums[name] = sums[name] + grad if name in sums else grad
            found |= {name: self._factors(run.calls[name], each / len(batches)) for name, each in sums.items()}
        run.require(found)
        return found

    def _factors(self, call: InitCall, gradient: Tensor) -> dict[str, Tensor]:
        gradient = gradient.to(torch.float32)
        gradient = gradient.t() if call.shape.by_input else gradient
        r = call.specs["lora_A"].shape[0]
        u, s, v = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
        of_a, of_b = _chosen(self.settings["direction"], r)
        a, b = v[:, of_a].t(), u[:, of_b] * s[of_b]
        scale = self.settings["scale"]
        if scale == "stable":
            b = b * (len(gradient) ** 0.25 / self.settings["stable_gamma"] ** 0.5)
        elif scale == "weight_svd":
            weight = call.read()
            _, largest, _ = torch.svd_lowrank(weight.t() if call.shape.by_input else weight, q=r, niter=4)
            b = b * (largest[0] / s[of_b][0]) if s[of_b][0] > 0 else b
        elif scale == "gd_scale":
            a, b = a / call.scaling, b / call.scaling
        return {"lora_A": a, "lora_B": b}

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        return subtracted(call, call.statistics)


def _chosen(direction: str, r: int) -> tuple[Tensor, Tensor]:
    """Which singular vectors A and B get."""
    every = torch.arange(2 * r)
    if direction == "ArBr":
        return every[1::2], every[0::2]
    if direction == "A2rBr":
        return every[r:], every[:r]
    if direction == "random":
        some = torch.randperm(2 * r)[:r]
        return some, some
    return every[:r], every[r:]

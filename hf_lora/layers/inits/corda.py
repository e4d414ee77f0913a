"""CorDA (Yang et al. 2024, arXiv:2406.05223): A and B from the weight as the covariance of its inputs sees it.

The product is subtracted from the base, which itself does not change: see `Init.takes_out`. All numbers are those of
PEFT for the same batches, each row of which is a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...errors import StateError
from ..contract import Shape
from .base import Init, InitCall
from .batches import Run, marked_rows
from .decompositions import refuse_few_directions, refuse_others, subtracted

METHODS_OF_CORDA = ("ipm", "kpm")
INERT = {
    "cache_file": None, "covariance_file": None, "verbose": False, "use_float16_for_covariance": False,
    "prune_temporary_fields": True,
}  # fmt: skip
"""Settings of PEFT that have no counterpart, with their defaults."""


class Corda(Init):
    """With W C = U S V for the covariance C of the inputs, B A is a part of U S (V C⁻¹) = W.

    `corda_config={"corda_method": …}`: `"ipm"` (instruction-previewed, the default) trains the largest singular
    values; `"kpm"` (knowledge-preserved) the smallest, so that what the batches need stays as it is.
    """

    takes_out = True
    repeatable = False
    needs: ClassVar[Literal["inputs"]] = "inputs"
    settings: Mapping[str, Any] = {"corda_method": "ipm", **INERT}

    def refuse(self, layer: Any, shape: Shape) -> str | None:
        return super().refuse(layer, shape) or refuse_others(shape)

    def refuse_rank(self, layer: Any, shape: Shape, r: int) -> str | None:
        return refuse_few_directions(layer, shape, r)

    def refuse_settings(self, values: Mapping[str, Any]) -> str | None:
        if (method := values.get("corda_method", "ipm")) not in METHODS_OF_CORDA:
            return f"corda_method={method!r} must be one of {', '.join(METHODS_OF_CORDA)}"
        unused = [name for name in ("cache_file", "covariance_file", "use_float16_for_covariance") if values.get(name)]
        return f"not supported: {', '.join(unused)}" if unused else super().refuse_settings(values)

    def observe(self, run: Run) -> dict[str, dict[str, Tensor]]:
        """Name of a site -> its A and B."""
        batches = run.kept()
        leaders = run.leaders(batches[0], lambda x: x.reshape(-1, x.shape[-1]))
        widths = {name: run.calls[name].specs["lora_A"].shape[1] for name in dict.fromkeys(leaders.values())}
        found = {}
        for group in run.groups({name: 4 * width**2 for name, width in widths.items()}):
            covariances = {name: torch.zeros(()) for name in group}
            samples = dict.fromkeys(group, 0)

            def add(name: str, x: Tensor, masks: list[Tensor], covariances=covariances, samples=samples) -> None:  # type: ignore[no-untyped-def]
                for row in _samples(x, masks):
                    scaled = row / row.max().abs()
                    covariances[name] = covariances[name].to(row.device) + scaled.t() @ scaled
                    samples[name] += 1

            for batch in run.shown(batches):
                with run.watching(group, partial(add, masks=marked_rows(batch))):
                    run.forward(batch, [])
            for name in run.shown([name for name, leader in leaders.items() if leader in covariances]):
                leader = leaders[name]
                found[name] = self._factors(run.calls[name], covariances[leader] / samples[leader], name)
        return found

    def _factors(self, call: InitCall, covariance: Tensor, name: str) -> dict[str, Tensor]:
        if not torch.isfinite(covariance).all():
            raise StateError(
                f"CorDA: the inputs of {name} are not finite, or all zero, in one of the batches. Name it in "
                "exclude_modules, or pass other batches."
            )
        weight = call.read()
        weight = weight.t() if call.shape.by_input else weight
        damped, inverse = _inverted(covariance.to(weight.device))
        u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
        r = call.specs["lora_A"].shape[0]
        part = slice(r) if self.settings["corda_method"] == "ipm" else slice(len(s) - r, len(s))
        root = (s[part] / call.scaling).sqrt()
        return {"lora_A": root[:, None] * (vh[part] @ inverse), "lora_B": u[:, part] * root}

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        return subtracted(call, call.statistics)


def _samples(x: Tensor, masks: list[Tensor]) -> list[Tensor]:
    """The samples (T, I) of an input: the rows of a batch (B, T, I), without padding, or the input itself."""
    x = x.to(torch.float32)
    if x.dim() < 3:
        return [x.reshape(-1, x.shape[-1])]
    mask = next((mask.to(x.device) for mask in masks if mask.shape == x.shape[:-1]), None)
    return [row.flatten(0, -2) if mask is None else row[mask[i]] for i, row in enumerate(x)]


def _inverted(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The covariance, damped until it can be inverted, and its inverse."""
    one, damp = torch.eye(len(covariance), device=covariance.device), 0.01
    while True:
        damped = covariance + one * (covariance.diagonal().mean() * damp)
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, one) < 0.05 or damp > 1e6:
            return damped, inverse
        damp *= 2

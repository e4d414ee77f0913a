"""The grid of layers that the laws run over, the toy method, and the formulas in float64 that they are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from helpers import randomize
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from hf_lora import METHODS, LoraConfig, register
from hf_lora.adapt.activation import set_active
from hf_lora.adapt.inject import inject
from hf_lora.adapt.state import require_state
from hf_lora.layers.contract import FactorSpec, Method, Shape


@dataclass(frozen=True)
class Case:
    """One layer, an input for it, and how B A looks in its weight's layout."""

    name: str
    make: Callable[[], nn.Module]
    size: tuple[int, ...]
    kind: str  # "linear", "transposed", "embedding" or "conv"

    def layer(self, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(1)
        layer = self.make().eval().to(dtype)
        for parameter in layer.parameters():
            if parameter.dim() == 1:  # a zero bias would hide what is done to it
                nn.init.normal_(parameter)
        return layer.requires_grad_(False)

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        if self.kind == "embedding":
            return torch.randint(0, 30, self.size, generator=generator)
        return torch.randn(self.size, generator=generator).to(dtype)

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """B A as PEFT defines it, from A and B in float64."""
        if self.kind == "linear":
            return b @ a
        if self.kind == "conv":
            return torch.einsum("or,ri...->oi...", b.flatten(1), a)
        return (b @ a).t()

    def norm(self, weight: Tensor) -> Tensor:
        """Norm of what feeds each output, with dimensions to multiply the weight by."""
        if self.kind in ("transposed", "embedding"):
            return weight.norm(dim=0, keepdim=True)
        return weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))


CASES = [
    Case("linear", lambda: nn.Linear(24, 40), (5, 7, 24), "linear"),
    Case("linear-no-bias", lambda: nn.Linear(24, 40, bias=False), (5, 24), "linear"),
    Case("transposed", lambda: Conv1D(40, 24), (5, 7, 24), "transposed"),
    Case("embedding", lambda: nn.Embedding(30, 24), (5, 7), "embedding"),
    Case("embedding-padding", lambda: nn.Embedding(30, 24, padding_idx=1), (5, 7), "embedding"),
    Case("embedding-scaled", lambda: BartScaledWordEmbedding(30, 24, 1, embed_scale=4.9), (5, 7), "embedding"),
    Case("conv1d", lambda: nn.Conv1d(8, 12, 3, padding=1), (4, 8, 11), "conv"),
    Case(
        "conv1d-same-circular",
        lambda: nn.Conv1d(8, 12, 4, padding="same", padding_mode="circular"),
        (4, 8, 11),
        "conv",
    ),
    Case("conv2d", lambda: nn.Conv2d(8, 12, 3, bias=False), (4, 8, 9, 9), "conv"),
    Case("conv2d-reflect", lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), (4, 8, 9, 9), "conv"),
    Case("conv2d-dilated", lambda: nn.Conv2d(8, 12, (3, 2), stride=2, dilation=2, padding=1), (4, 8, 9, 9), "conv"),
    Case("conv3d", lambda: nn.Conv3d(8, 12, (2, 3, 3), stride=(1, 2, 2)), (4, 8, 4, 7, 7), "conv"),
]
TOY_CASES = [case for case in CASES if case.name in ("linear", "embedding")]
BY_NAME = {case.name: case for case in CASES}


class Toy(Method):
    """Weight-decomposed: W' = m V / |V| with V = W + s B A and |V| over what feeds each output (arXiv:2402.09353)."""

    kind = "toy"
    keys = {"lora_magnitude_vector": "lora_magnitude_vector"}

    def factors(self, layer: nn.Module, shape: Shape, r: int) -> dict[str, FactorSpec]:
        magnitude = FactorSpec((shape.features(layer)[1],), self.keys["lora_magnitude_vector"], "O")
        return {**shape.specs(layer, r), "lora_magnitude_vector": magnitude}

    def start(self, layer: Any, name: str) -> dict[str, Tensor]:
        return {"lora_magnitude_vector": self._norm(layer, name)}

    def forward(self, layer: Any, x: Tensor, names: tuple[str, ...]) -> Tensor:
        (name,) = names
        shape, y = layer._lora.shape, layer.product(x)
        gain = shape.on_output(layer, self._gain(layer, name))
        bias = getattr(layer, "bias", None)
        linear = y if bias is None else y - shape.on_output(layer, bias).to(y.dtype)
        update = shape.update(layer, name, x, layer._lora.adapters[name].scaling)
        return y + ((gain - 1) * linear + gain * update).to(y.dtype)

    def fold(self, layer: Any, block: Tensor, names: tuple[str, ...], rows: slice) -> Tensor:
        (name,) = names
        shape = layer._lora.shape
        block.add_(shape.delta(layer, name, rows), alpha=layer._lora.adapters[name].scaling)
        return block * shape.on_weight(layer, self._gain(layer, name), rows)

    def _gain(self, layer: Any, name: str) -> Tensor:
        return layer.lora_magnitude_vector[name].weight / self._norm(layer, name)

    def _norm(self, layer: Any, name: str) -> Tensor:
        state, rows = layer._lora, slice(0, layer.weight.shape[0])
        return state.shape.norm(
            state.storage.read(layer, rows)
            + state.adapters[name].scaling * state.shape.delta(layer, name, rows).float()
        )


TOY = register(METHODS, "toy", Toy())
ADDITIVE, DORA, LORA_BIAS, LORA_FA = (METHODS[name] for name in ("lora", "dora", "lora_bias", "lora_fa"))
BIASED = [case for case in CASES if case.name in ("linear", "transposed", "conv2d-dilated")]


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(
    case: Case, method: Method, dtype: torch.dtype, adapters: int, fresh: bool = False, **config: Any
) -> Holder:
    """A model of one layer with active adapters of ranks 4 and 6."""
    model = Holder(case.layer(dtype)).eval()
    names = ["one", "two"][:adapters]
    for i, name in enumerate(names):
        one = LoraConfig(r=4 + 2 * i, lora_alpha=6, target_modules=["layer"], method=method.kind, **config)
        inject(model, one, name)
    set_active(model, require_state(model, "test"), tuple(names))
    if not fresh:
        randomize(model, seed=3)
    return model


def exact_weight(case: Case, model: Any) -> Tensor:
    """The weight with the active adapters in it, in float64, from the written formula."""
    layer = model.layer
    weight = layer.weight.detach().double()
    for name in layer._lora.names:
        a, b = layer.lora_A[name].weight.detach().double(), layer.lora_B[name].weight.detach().double()
        weight = weight + 6 / a.shape[0] * case.delta(a, b)
        if layer._lora.adapters[name].method.kind in ("toy", "dora"):
            magnitude = layer.lora_magnitude_vector[name].weight.detach().double()
            norm = case.norm(weight)
            weight = weight * magnitude.view_as(norm) / norm
    return weight


def plain_layer(case: Case, layer: Any, weight: Tensor) -> nn.Module:
    """A layer of the plain class in float64 with `weight`, and the bias of `layer` with those of its adapters."""
    plain = case.layer().double()
    plain.weight.copy_(weight)
    if getattr(plain, "bias", None) is not None:
        plain.bias.copy_(layer.bias.double())
        for name, adapter in layer._lora.adapters.items():
            if adapter.method.kind == "lora_bias":
                plain.bias += 6 / adapter.r * layer.lora_B_bias[name].weight.detach().double()
    return plain

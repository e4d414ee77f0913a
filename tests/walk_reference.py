"""What the walk over the verbs is held to: a small net and its adapters in float64, in written-out formulas.

Nothing of the library is in it: it holds numbers by name, says which calls are refused, and computes the output, the
gradients, and every parameter that the adapted net must have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Key = tuple[str, str]
"""(path of a module, kind of tensor): a factor, `lora_bias`, or the name of a tensor of a module kept whole."""

LAYERS = ("embedding", "doubled", "negated", "transposed", "convolution", "linear", "beside", "pair", "head")
"""What takes factors."""
WEIGHTS = {"pair": ("first", "second")}
"""The weights of a module that has others than `weight`."""
BIASED = ("norm", "transposed", "convolution", "linear", "beside", "pair", "head")
BY_INPUT = ("embedding", "transposed")
"""Layers whose weight has a row for each input."""


@dataclass(frozen=True)
class Plan:
    """What one adapter is."""

    targets: tuple[str, ...]
    method: Literal["lora", "gain"] = "lora"
    r: int = 3
    alpha: float = 5.0
    ranks: Mapping[str, int] = field(default_factory=dict)
    init: Literal["constant", "top"] = "constant"
    rows: tuple[int, ...] = ()
    bias: Literal["none", "all", "lora_only"] = "none"
    whole: tuple[str, ...] = ()

    def scaling(self, path: str) -> float:
        return self.alpha / self.ranks.get(path, self.r)

    @property
    def biases(self) -> tuple[str, ...]:
        """Paths of the modules that get a bias of the adapter's own."""
        known = tuple(path for path in BIASED if path != "pair")  # which has one only where it is adapted
        among = {"none": (), "all": (*known, *self.targets), "lora_only": self.targets}[self.bias]
        return tuple(path for path in BIASED if path in among and path not in self.whole)

    def owned(self) -> Iterator[Key]:
        kinds = ["lora_A", "lora_B"]
        kinds += ["lora_gain"] if self.method == "gain" else []
        kinds += ["lora_A0", "lora_B0"] if self.init == "top" else []
        ends = ((path, end) for path in self.targets for end in ends_of(path))
        yield from ((path, kind + end) for path, end in ends for kind in kinds)
        yield from [("embedding", "lora_rows")] if self.rows else []
        yield from ((path, "lora_bias") for path in self.biases)
        yield from ((path, kind) for path in self.whole for kind in ("weight", "bias"))


def ends_of(path: str) -> list[str]:
    """What the kinds of a module's factors end in."""
    return [f"_{weight}" for weight in WEIGHTS[path]] if path in WEIGHTS else [""]


def is_frozen(kind: str) -> bool:
    """Whether it is what an initialization took out of the base."""
    return kind.startswith(("lora_A0", "lora_B0"))


@dataclass
class Adapter:
    plan: Plan
    trainable: bool
    tensors: dict[Key, Tensor]
    labels: str | None = None
    """What its labels are called, if it has a head."""


class Expected(NamedTuple):
    """A parameter of the adapted net.

    Args:
        exact: whether every bit is known; else an adapter is folded into it.
    """

    value: Tensor
    dtype: torch.dtype
    requires_grad: bool
    exact: bool = True


class Reference:
    """The slow model.

    Args:
        base: name -> parameter of the plain net.
        required: name -> whether it requires a gradient there.
    """

    def __init__(self, base: Mapping[str, Tensor], required: Mapping[str, bool], dtype: torch.dtype) -> None:
        self.base = {name: tensor.detach().double() for name, tensor in base.items()}
        self.required, self.dtype, self.training = dict(required), dtype, True
        self.coarsest = dtype
        """The coarsest dtype that merged weights were in."""
        self.end()

    # Rules -----------------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """The plain net again."""
        self.present, self.enabled = False, True
        self.adapters: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()

    def add(self, name: str, adapter: Adapter) -> None:
        self.present = True
        self.adapters[name] = adapter
        self.active = (name,)

    def remove(self, name: str) -> None:
        del self.adapters[name]
        was_active = name in self.active
        self.active = tuple(n for n in self.active if n != name)
        if was_active and not self.active:
            self.active = tuple(self.adapters)[-1:]

    def cast(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        if torch.finfo(dtype).eps > torch.finfo(self.coarsest).eps:
            self.coarsest = dtype

    def merge(self, names: tuple[str, ...] | None) -> None:
        self.active, self.unmerged = self.active if names is None else names, self.active
        self.merged, self.coarsest = self.active, self.dtype

    def unmerge(self) -> None:
        self.active, self.merged = self.unmerged, ()

    def takes(self, name: str) -> bool:
        """Whether an adapter of this name can be added."""
        return not self.merged and name not in self.adapters

    def gives(self, name: str) -> bool:
        """Whether adapter `name` can be changed, or taken away."""
        return not self.merged and name in self.adapters

    def activates(self, names: tuple[str, ...]) -> bool:
        """Whether these can be the active adapters."""
        if not self.present or self.merged or len(set(names)) < len(names) or not set(names) <= set(self.adapters):
            return False
        plans = [self.adapters[name].plan for name in names]
        replaced = [
            k for plan in plans for k in plan.owned() if not k[1].startswith(("lora_A", "lora_B", "lora_rows"))
        ]
        rows = [row for plan in plans for row in plan.rows]
        adapted = [path for plan in plans for path in plan.targets]
        gains = {path for plan in plans for path in plan.targets if plan.method == "gain"}
        if len(set(rows)) < len(rows) or self._crosses(plans):
            return False
        return len(set(replaced)) == len(replaced) and all(adapted.count(path) == 1 for path in gains)

    def merges(self, names: tuple[str, ...] | None) -> bool:
        """Whether these (or the active adapters) can be folded into the weights."""
        wanted = self.active if names is None else names
        return self.enabled and bool(wanted) and self.activates(wanted)

    def _crosses(self, plans: Sequence[Plan]) -> bool:
        """Whether one of these adapters keeps a module whole that another one adapts, which would not act."""
        touched = [{*plan.targets, *plan.biases, *(["embedding"] if plan.rows else [])} for plan in plans]
        return any(set(plan.whole) & paths for plan in plans for paths in touched)

    @property
    def acting(self) -> tuple[str, ...]:
        return self.active if self.enabled else ()

    @property
    def labels(self) -> str | None:
        """What the labels of the head that runs are called; None for the base's."""
        return next((self.adapters[name].labels for name in self.acting if self.adapters[name].plan.whole), None)

    @property
    def trained(self) -> list[tuple[str, Key]]:
        """(adapter, key) of what a training step changes."""
        names = [name for name in self.acting if self.adapters[name].trainable]
        return [(name, key) for name in names for key in self.adapters[name].tensors if not is_frozen(key[1])]

    # Numbers ---------------------------------------------------------------------------------------------------------

    def output(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, O)"""
        return forward(self._weights(self.acting, self._tensors()), ids)

    def gradients(self, ids: Tensor, wanted: Tensor) -> dict[tuple[str, Key], tuple[Tensor, float]]:
        """Those of the mean square of the output's distance from `wanted`.

        Returns:
            (adapter, key) -> the gradient, and the sum of the norms of each token's share of it, which may cancel.
        """
        tensors = self._tensors()
        leaves = {(name, key): tensors[name][key].clone().requires_grad_(True) for name, key in self.trained}
        for (name, key), leaf in leaves.items():
            tensors[name][key] = leaf
        losses = (forward(self._weights(self.acting, tensors), ids) - wanted).square().flatten(0, 1).mean(1)
        shares = [torch.autograd.grad(loss / len(losses), list(leaves.values()), retain_graph=True) for loss in losses]
        found = [torch.stack(own) for own in zip(*shares, strict=True)]
        return {
            place: (own.sum(0), float(own.flatten(1).norm(dim=1).sum()))
            for place, own in zip(leaves, found, strict=True)
        }

    def parameters(self) -> dict[str, Expected]:
        """Name -> every parameter of the adapted net."""
        folded = self._weights(self.merged if self.enabled else (), self._tensors(), whole=False)
        found = {}
        for name, value in self.base.items():
            required = not self.present and self.required[name]
            found[self.name_of(name)] = Expected(folded[name], self.dtype, required, folded[name] is value)
        for name, adapter in self.adapters.items():
            required = adapter.trainable and name in self.active
            for key, tensor in adapter.tensors.items():
                found[self.name_of_own(name, key)] = Expected(
                    tensor, torch.float32, required and not is_frozen(key[1])
                )
        return found

    def name_of(self, name: str) -> str:
        """What a parameter of the plain net is called."""
        path, _, leaf = name.rpartition(".")
        return f"{self._inside(path)}.{leaf}"

    def name_of_own(self, adapter: str, key: Key) -> str:
        path, kind = key
        if kind.startswith("lora_"):
            return f"{self._inside(path)}.{kind}.{adapter}.weight"
        return f"{path}.copies.{adapter}.{kind}"

    def holds(self, path: str) -> tuple[bool, bool, bool]:
        """Whether any adapter has factors, a bias, and a copy of this module."""
        plans = [adapter.plan for adapter in self.adapters.values()]
        return (
            any(path in plan.targets for plan in plans),
            any(path in plan.biases for plan in plans),
            any(path in plan.whole for plan in plans),
        )

    def _inside(self, path: str) -> str:
        return f"{path}.base_layer" if self.holds(path)[2] else path

    def _tensors(self) -> dict[str, dict[Key, Tensor]]:
        return {name: dict(adapter.tensors) for name, adapter in self.adapters.items()}

    def _weights(
        self, names: tuple[str, ...], tensors: Mapping[str, Mapping[Key, Tensor]], whole: bool = True
    ) -> dict[str, Tensor]:
        """The plain net's weights with adapters in them; what none reaches is the very tensor of `base`."""
        weights = dict(self.base)
        for name in names:
            plan, own = self.adapters[name].plan, tensors[name]
            for path, end in ((target, end) for target in plan.targets for end in ends_of(target)):
                weight = f"{path}.{end[1:] or 'weight'}"
                weights[weight] = weights[weight] + update(plan, path, end, own)
            for path in plan.biases:
                weights[f"{path}.bias"] = own[path, "lora_bias"]
        for name in names:
            if rows := self.adapters[name].plan.rows:
                own_rows = tensors[name]["embedding", "lora_rows"]
                weights["embedding.weight"] = weights["embedding.weight"].index_copy(0, torch.tensor(rows), own_rows)
        for name in names if whole else ():
            for path in self.adapters[name].plan.whole:
                for kind in ("weight", "bias"):
                    weights[f"{path}.{kind}"] = tensors[name][path, kind]
        return weights


def update(plan: Plan, path: str, end: str, own: Mapping[Key, Tensor]) -> Tensor:
    """What an adapter adds to a stored weight."""

    def product(a: str, b: str) -> Tensor:
        factors = own[path, b + end].flatten(1), own[path, a + end].flatten(1)
        return plan.scaling(path) * torch.einsum("or,ri->oi", *factors)

    a, b = own[path, f"lora_A{end}"], own[path, f"lora_B{end}"]
    delta = product("lora_A", "lora_B")
    if plan.method == "gain":
        delta = own[path, f"lora_gain{end}"][:, None] * delta
    if plan.init == "top":
        delta = delta - product("lora_A0", "lora_B0")
    if path in BY_INPUT:
        return delta.t()
    return -delta if path == "negated" else delta.view(len(b), *a.shape[1:])


def forward(w: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """The net in written-out formulas: ids (B, T) -> (B, T, O)."""
    h = w["embedding.weight"][ids]
    h = (2 * h @ w["doubled.weight"].t()).tanh()
    centered = h - h.mean(-1, keepdim=True)
    h = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["norm.weight"] + w["norm.bias"]
    h = (-2 * h @ w["negated.weight"].t()).tanh()
    h = (h @ w["transposed.weight"] + w["transposed.bias"]).tanh()
    edge = h.new_zeros(h.shape[0], 1, h.shape[2])
    padded, taps = torch.cat([edge, h, edge], 1), w["convolution.weight"].unbind(2)
    convolved = [padded[:, k : k + h.shape[1]] @ tap.t() for k, tap in enumerate(taps)]
    h = (torch.stack(convolved).sum(0) + w["convolution.bias"]).tanh()
    h = (h @ (w["linear.weight"] + w["beside.weight"]).t() + w["linear.bias"] + w["beside.bias"]).tanh()
    h = ((h @ w["pair.first"].t()).tanh() @ w["pair.second"].t() + w["pair.bias"]).tanh()
    return h @ w["head.weight"].t() + w["head.bias"]

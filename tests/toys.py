"""A method, an initialization, shapes, a storage and a kind of part such as another package may register."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_lora import INITS, METHODS, PARTS, SHAPES, STORAGES, register
from hf_lora.errors import Faults
from hf_lora.layers.contract import FactorSpec, Method, Shape
from hf_lora.layers.hosts import Activity, Held, Host, add_factor, remove_factor
from hf_lora.layers.inits import Collector, Init, InitCall, taken
from hf_lora.layers.methods import Additive
from hf_lora.layers.ops import to_float64
from hf_lora.layers.parts import Fold, Part, Planned
from hf_lora.layers.shapes.linear import LinearShape
from hf_lora.layers.storages import DenseStorage
from hf_lora.layers.views import LoraViews, View

Update = Callable[[Tensor, slice], Tensor]


class Gain(Method):
    """y = W x + g ∘ (scaling · B A x), with a third factor g (O,), stored as a column in a file."""

    kind = "gain"
    keys = {"lora_gain": "lora_gain.column"}

    def factors(self, layer: nn.Module, shape: Shape, r: int) -> dict[str, FactorSpec]:
        gain = FactorSpec(
            (shape.features(layer)[1],), self.keys["lora_gain"], "O", to_disk=as_column, from_disk=from_column
        )
        return {**shape.specs(layer, r), "lora_gain": gain}

    def start(self, layer: Any, name: str) -> dict[str, Tensor]:
        return {"lora_gain": torch.ones(layer.weight.shape[0])}

    def forward(self, layer: Any, x: Tensor, names: tuple[str, ...]) -> Tensor:
        (name,) = names
        update = layer._lora.shape.update(layer, name, x, layer._lora.adapters[name].scaling)
        y: Tensor = layer.product(x)
        return y + (layer.factor("lora_gain", name) * update).to(y.dtype)

    def fold(self, layer: Any, block: Tensor, names: tuple[str, ...], rows: slice) -> Tensor:
        (name,) = names
        gain = layer.factor("lora_gain", name)[rows, None].to(block.dtype)
        delta = layer._lora.shape.delta(layer, name, rows).to(block.dtype)
        return block + layer._lora.adapters[name].scaling * gain * delta


class Shift(Additive):
    """y = W x + scaling · (B A x + b), with a bias b (O,) of the update."""

    kind = "shift"
    keys = {"lora_shift": "lora_shift"}

    def factors(self, layer: nn.Module, shape: Shape, r: int) -> dict[str, FactorSpec]:
        shift = FactorSpec((shape.features(layer)[1],), "lora_shift", "O")
        return {**shape.specs(layer, r), "lora_shift": shift}

    def forward(self, layer: Any, x: Tensor, names: tuple[str, ...]) -> Tensor:
        y = super().forward(layer, x, names)
        for name in names:
            y = y + (layer._lora.adapters[name].scaling * layer.factor("lora_shift", name)).to(y.dtype)
        return y

    def folding_bias(self, layer: Any, names: tuple[str, ...]) -> Callable[[Tensor, slice], Tensor]:
        shifts = [layer._lora.adapters[name].scaling * to_float64(layer.factor("lora_shift", name)) for name in names]
        return lambda block, rows: block + sum(shift[rows] for shift in shifts)

    def refuse_folding(self, layer: Any) -> str | None:
        return "it has no bias" if layer.bias is None else None


def as_column(gain: Tensor) -> Tensor:
    return gain[:, None]


def from_column(gain: Tensor) -> Tensor:
    return gain[:, 0]


class Constant(Init):
    """A of 0.1 throughout, B zero."""

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        values = call.zeros()
        values["lora_A"].fill_(0.1)
        return values


class Top(Init):
    """The largest singular directions of the weight are trained, and taken out of the base."""

    in_files = None
    takes_out = True

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        values = call.zeros()
        u, s, v = torch.linalg.svd(call.read().double(), full_matrices=False)
        r = len(values["lora_A"])
        root = (s[:r] / call.scaling).sqrt()
        values["lora_A"].copy_(root[:, None] * v[:r])
        values["lora_B"].copy_(u[:, :r] * root)
        return values | {taken(kind): values[kind].clone() for kind in ("lora_A", "lora_B")}


class Once(Top):
    """The same of directions that change from call to call."""

    in_files = True
    repeatable = False
    calls = 0

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        Once.calls += 1
        values = super().__call__(call)
        return {kind: value.roll(Once.calls, dims=int("B" in kind)) for kind, value in values.items()}


class Seen:
    """The inputs of one module."""

    def __init__(self, layer: Any) -> None:
        self.inputs: list[Tensor] = []
        self.handle = layer.register_forward_pre_hook(self.see)

    def see(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.inputs.append(given[0].detach().reshape(-1, given[0].shape[-1]).double())

    def result(self) -> tuple[Tensor, Tensor]:
        """(directions, variances) of the inputs."""
        self.handle.remove()
        x = torch.cat(self.inputs)
        _, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        return v, s.square()


class Directions(Init):
    """A of the main directions of the inputs; `directions_50`: as many as explain 50 % of the variance."""

    needs = "inputs"
    takes_options = True

    def collect(self, layer: Any) -> Collector:
        return Seen(layer)

    def ranks(self, statistics: Mapping[str, Any], wanted: Mapping[str, int], options: str) -> dict[str, int]:
        share = float(options or 100) / 100
        found = {name: variances.cumsum(0) / variances.sum() for name, (_, variances) in statistics.items()}
        return {name: min(wanted[name], int((shares < share).sum()) + 1) for name, shares in found.items()}

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        values = call.zeros()
        values["lora_A"].copy_(call.statistics[0][: len(values["lora_A"])])
        return values


class Gradient:
    """The gradient of one layer's weight, summed over batches."""

    def __init__(self, layer: Any) -> None:
        self.sum: Any = 0.0
        self.handle = layer.register_forward_hook(self.see)

    def see(self, module: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
        x = given[0].detach().flatten(0, -2)
        y.register_hook(lambda g: setattr(self, "sum", self.sum + g.flatten(0, -2).t() @ x))

    def result(self) -> Any:
        self.handle.remove()
        return self.sum


class Downhill(Init):
    """A of the main directions of the weight's gradient."""

    needs = "gradients"

    def collect(self, layer: Any) -> Collector:
        return Gradient(layer)

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        values = call.zeros()
        values["lora_A"].copy_(torch.linalg.svd(call.statistics).Vh[: len(values["lora_A"])])
        return values


class Lost(Init):
    """B A is what was lost of the checkpoint's weight, as far as its rank goes."""

    needs = "original"

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        assert call.original is not None
        values = call.zeros()
        u, s, v = torch.linalg.svd((call.original() - call.read()).double(), full_matrices=False)
        r = len(values["lora_A"])
        values["lora_A"].copy_(v[:r])
        values["lora_B"].copy_(u[:, :r] * s[:r] / call.scaling)
        return values


class Doubled(nn.Module):
    """y = 2 W x, and no linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * 2


class DoubledShape(LinearShape):
    plain_forward: Any = None

    def claims(self, layer: nn.Module) -> bool:
        return isinstance(layer, Doubled)

    def features(self, layer: Any) -> tuple[int, int]:
        return layer.weight.shape[1], layer.weight.shape[0]

    def weight(self, layer: Any, x: Tensor) -> Tensor | None:
        return None

    def update(self, layer: Any, name: str, x: Tensor, scaling: float = 1.0) -> Tensor:
        return super().update(layer, name, x, 2 * scaling)

    is_matrix = False


class Negated(Doubled):
    """y = -2 W x: its weight is kept with the other sign."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * -2


class NegatedStorage(DenseStorage):
    kind = "negated"

    def owns(self, layer: nn.Module) -> bool:
        return isinstance(layer, Negated)

    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        return super().read(layer, rows, into).neg_()

    def write(self, layer: nn.Module, rows: slice, block: Tensor) -> None:
        super().write(layer, rows, -block)


class Pair(nn.Module):
    """y = second tanh(first x) + bias: two weights in one module, which multiplies by both itself."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(hidden, inputs) / inputs**0.5)
        self.second = nn.Parameter(torch.randn(outputs, hidden) / hidden**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.first).tanh(), self.second, self.bias)


class PairLayer(LoraViews):
    def forward(self, x: Tensor) -> Tensor:
        return self.site("second").respond(self.site("first").respond(x).tanh())


class PairShape(LinearShape):
    mixin = PairLayer

    def claims(self, layer: nn.Module) -> bool:
        return isinstance(layer, Pair)

    def sites(self, layer: nn.Module) -> list[View]:
        return [View(layer, "first"), View(layer, "second", "bias")]

    def features(self, layer: Any) -> tuple[int, int]:
        return layer.weight.shape[1], layer.weight.shape[0]

    def prefix(self, layer: Any) -> str:
        return f"{layer.name}."


class Stack(nn.Module):
    """y = tanh(W₁ tanh(W₀ x)), of one stored tensor (2, O, O)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.stacked = nn.Parameter(torch.randn(2, size, size) / size**0.5)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.stacked:
            x = F.linear(x, weight).tanh()
        return x


class Piece(View):
    """`module.stacked[index]`, seen as a layer."""

    def __init__(self, module: nn.Module, index: int) -> None:
        super().__init__(module, f"stacked.{index}")
        self.index = index

    @property
    def weight(self) -> Any:
        return self.module.stacked[self.index]  # type: ignore[index]

    @property
    def _parameters(self) -> dict[str, Any]:
        return {"weight": self.module.stacked, "bias": None}

    def lifted(self, start: Callable[[], Update]) -> tuple[View, Callable[[], Update]]:
        def lift() -> Update:
            update = start()

            def lifted(block: Tensor, rows: slice) -> Tensor:
                if rows.start <= self.index < rows.stop:
                    piece = block[self.index - rows.start]
                    piece.copy_(update(piece, slice(0, len(piece))))
                return block

            return lifted

        return View(self.module, "stacked"), lift


class StackLayer(LoraViews):
    def forward(self, x: Tensor) -> Tensor:
        for name in ("stacked.0", "stacked.1"):
            x = self.site(name).respond(x).tanh()
        return x


class StackShape(PairShape):
    mixin = StackLayer

    def claims(self, layer: nn.Module) -> bool:
        return isinstance(layer, Stack)

    def sites(self, layer: nn.Module) -> list[View]:
        return [Piece(layer, 0), Piece(layer, 1)]


class RowsHeld(Held):
    """What a `RowsHost` knows: the ids of each adapter's rows."""

    def __init__(self, activity: Activity) -> None:
        super().__init__(activity)
        self.ids: dict[str, list[int]] = {}


class RowsHost(Host):
    """An embedding of which adapters have some rows of their own."""

    attribute = "_toy_rows"
    knows = RowsHeld
    order = 20
    _toy_rows: RowsHeld
    lora_rows: nn.ModuleDict

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        for name in self._toy_rows.acting:
            own: Any = self.lora_rows[name].weight
            hit = x[..., None] == torch.tensor(self._toy_rows.ids[name], device=x.device)
            chosen = F.embedding(hit.int().argmax(-1), own).to(y.dtype)
            y = torch.where(hit.any(-1, keepdim=True), chosen, y)
        return y


class Rows(Part):
    """Rows of an embedding, by their ids: `parts={"rows": {"embed": [1, 5]}}`."""

    keys = ("toy_rows.weight",)

    @classmethod
    def plan(cls, wanted: Any, modules: Mapping[str, nn.Module], faults: Faults) -> Iterator[Planned]:
        for path, ids in wanted.items():
            module = modules.get(path)
            if not isinstance(module, nn.Embedding) or max(ids) >= module.num_embeddings:
                faults.add(f"parts: rows {ids} of {path!r}: there is no such embedding, or no such row")
            else:
                yield Planned(path, module, {"rows": cls.spec(module, ids)}, ids)

    @classmethod
    def spec(cls, module: Any, ids: list[int]) -> FactorSpec:
        return FactorSpec((len(ids), module.embedding_dim), cls.keys[0])

    @classmethod
    def at(cls, path: str, module: nn.Module) -> Iterator[Part]:
        if isinstance(module, RowsHost):
            for name in module._toy_rows.names:
                yield cls(path, module, name)

    def attach(self, activity: Activity, planned: Any) -> None:
        held: Any = RowsHost.hold(self.module, activity)
        held.ids[self.adapter] = planned.options
        held.add(self.adapter)
        add_factor(self.module, "lora_rows", self.adapter, self.module.weight.detach()[planned.options])

    def tensors(self) -> Iterator[tuple[FactorSpec, Tensor]]:
        yield self.spec(self.module, self.ids), self.own

    def remove(self, keep: bool = False) -> None:
        del self.module._toy_rows.ids[self.adapter]
        remove_factor(self.module, "lora_rows", self.adapter)
        RowsHost.let_go(self.module, self.adapter)

    def conflict(self, others: Sequence[Part]) -> str | None:
        counted = [i for part in (self, *others) for i in part.ids]  # type: ignore[attr-defined]
        return f"{self.path}: rows are in two adapters" if len(set(counted)) < len(counted) else None

    def folds(self, others: Sequence[Part]) -> Iterator[Fold]:
        everyone: list[Any] = [self, *others]

        def put(block: Tensor, rows: slice) -> Tensor:
            for part in everyone:
                for own, i in zip(part.own.detach(), part.ids, strict=True):
                    if rows.start <= i < rows.stop:
                        block[i - rows.start] = own
            return block

        yield Fold(f"{self.path}.weight", self.module, DenseStorage(), lambda: put, (self.path,))

    @property
    def ids(self) -> list[int]:
        ids: list[int] = self.module._toy_rows.ids[self.adapter]
        return ids

    @property
    def own(self) -> Any:
        return self.module.lora_rows[self.adapter].weight


TOYS: list[tuple[Any, str, Any]] = [
    (METHODS, "gain", Gain()),
    (METHODS, "shift", Shift()),
    (INITS, "constant", Constant()),
    (INITS, "top", Top()),
    (INITS, "once", Once()),
    (INITS, "directions", Directions()),
    (INITS, "downhill", Downhill()),
    (INITS, "lost", Lost()),
    (SHAPES, "doubled", DoubledShape()),
    (SHAPES, "pair", PairShape()),
    (SHAPES, "stack", StackShape()),
    (STORAGES, "negated", NegatedStorage()),
    (PARTS, "rows", Rows),
]
"""(registry, name, entry)"""


@contextmanager
def registered() -> Iterator[None]:
    """The toys, for the time of a `with` block."""
    for registry, name, entry in TOYS:
        register(registry, name, entry)
    try:
        yield
    finally:
        for registry, name, _ in TOYS:
            registry.pop(name, None)

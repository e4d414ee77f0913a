"""The interface of parts, planned parts, and how merging changes a tensor of the base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...errors import Faults, StateError
from ..contract import FactorSpec, Storage, Update
from ..hosts import Activity


@dataclass
class Fold:
    """How merging changes one tensor of the base.

    Args:
        name: original name of the tensor, such as `"encoder.query.weight"`.
        site: holds it as `site.weight`.
        storage: reads and writes it.
        start: called before each pass over the tensor; returns (block, rows) -> the merged block, which may overwrite
            `block` (float64 if the device supports it). What `start` computes is kept only for that pass.
        holders: original names of the modules that may share the tensor, because the update applies to each of them;
            None if it applies to every module that holds it.
        refused: why it cannot be merged, though it works unmerged; None if it can.
    """

    name: str
    site: Any
    storage: Storage
    start: Callable[[], Update]
    holders: Sequence[str] | None
    refused: str | None = None

    @property
    def label(self) -> str:
        """Its name in messages: the layer's name for a weight."""
        return self.name.removesuffix(".weight")


@dataclass
class Planned:
    """A part that will be created at one module, before anything is changed."""

    path: str
    module: nn.Module
    specs: Mapping[str, FactorSpec]
    options: Any = None
    """Further results of `Part.plan` that `Part.attach` needs."""
    kind: type[Part] = field(init=False)


class Part(ABC):
    """What one adapter owns at one module. Walks create parts, without tensors, which sharding and loading replace.

    Args:
        path: original name of the module.
        module: the module itself, or its `Replacement` for a module that is trained whole.
        adapter: name of the adapter.
    """

    replaces = False
    """Whether its tensors replace whole tensors of the base, rather than being added to them."""
    whole_module = False
    """Whether it is a module trained whole, such as a task head."""
    is_tied = False
    """Whether it holds a weight that another part at another module holds too."""
    keys: Sequence[str] = ()
    """Names of its tensors in files, relative to the module's path, unless a shape or method declares them."""

    def __init__(self, path: str, module: Any, adapter: str) -> None:
        self.path, self.module, self.adapter = path, module, adapter

    @property
    def name(self) -> str:
        """Its name in tables: that of its module, or of its weight if the module has several."""
        return self.path

    @classmethod
    def plan(cls, wanted: Any, modules: Mapping[str, nn.Module], faults: Faults) -> Iterable[Planned]:
        """The parts that a configuration requests with `parts={"<name of the kind>": wanted}`.

        Args:
            modules: original name -> module.
            faults: collects everything that is wrong with `wanted`.
        """
        faults.add(f"parts of this kind are requested by other fields of the configuration, not by {wanted!r}")
        return ()

    @classmethod
    @abstractmethod
    def at(cls, path: str, module: nn.Module) -> Iterator[Part]:
        """The parts of this kind at `module`, of all adapters."""

    @abstractmethod
    def attach(self, activity: Activity, planned: Any) -> nn.Module | None:
        """Attach it to the module. Returns the module to put in its place, if that is another one.

        Args:
            activity: the activity of the model.
            planned: the plan of this kind; a `Planned` for kinds of other packages.
        """

    @abstractmethod
    def tensors(self) -> Iterator[tuple[FactorSpec, Tensor]]:
        """Its tensors, each with its declaration."""

    @abstractmethod
    def remove(self, keep: bool = False) -> nn.Module | None:
        """Remove it from the module. Returns the module to put in its place, if that is another one.

        Args:
            keep: keep in place what `replaces` a module, as after a permanent merge.
        """

    @abstractmethod
    def folds(self, others: Sequence[Part]) -> Iterator[Fold]:
        """How merging it, together with `others` of its kind at its module, changes the tensors of the base.

        Empty for parts that act the same whether merged or not.
        """

    def fit(self) -> None:
        """Resize its tensors to the current size of the module: see fitting.py. Most modules never change size."""
        return None

    def conflict(self, others: Sequence[Part]) -> str | None:
        """Why it cannot act together with `others` of its kind at its module; None if it can."""
        return None

    def refuse_resizing(self) -> str | None:
        """Why the number of rows of its module cannot change; None if `fit` supports it."""
        return None

    @property
    def scales(self) -> bool:
        """Whether it has an update that `scale` can multiply. Parts that replace tensors of the base have none."""
        return False

    def scale(self, weight: float) -> None:
        """Multiply its update by `weight`, if it `scales`."""
        raise StateError(f"{self.name}: it has no update that could be multiplied.")

    def replaced(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(original name of a tensor of the base, its replacement, the tensor of the base), if it `replaces` any."""
        return iter(())


def replace_the_same(part: Part, others: Sequence[Part]) -> str:
    """The message for parts that replace the same tensors."""
    return f"{' and '.join(repr(p.adapter) for p in (part, *others))} each have their own"

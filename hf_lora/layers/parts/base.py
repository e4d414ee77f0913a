"""What every kind of part answers, what it plans, and what merging makes of a tensor of the base."""

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
    """What merging makes of one tensor of the base.

    Args:
        name: original name of the tensor, such as `"encoder.query.weight"`.
        site: holds it as `site.weight`.
        storage: reads and writes it.
        start: called before each pass over the tensor; returns (block, its rows) -> the block as merged. `block`, in
            float64 where the device has it, may be overwritten. What `start` computes is held for that pass alone.
        holders: original names of the modules that may hold the tensor, since the update is meant for each; None
            where it is meant for whichever does.
        refused: why it cannot be merged, though it acts unmerged; None where it can.
    """

    name: str
    site: Any
    storage: Storage
    start: Callable[[], Update]
    holders: Sequence[str] | None
    refused: str | None = None

    @property
    def label(self) -> str:
        """What messages call it: a weight by the name of its layer."""
        return self.name.removesuffix(".weight")


@dataclass
class Planned:
    """A part to be made: what a configuration comes to at one module, before anything is changed."""

    path: str
    module: nn.Module
    specs: Mapping[str, FactorSpec]
    options: Any = None
    """What `Part.plan` found and `Part.attach` needs to know besides."""
    kind: type[Part] = field(init=False)


class Part(ABC):
    """One adapter's own at one module. It is made on a walk and holds no tensor: sharding and loading replace them.

    Args:
        path: original name of the module.
        module: the module itself; of a module that is kept whole, what stands in its place.
        adapter: the adapter's name.
    """

    replaces = False
    """Whether its tensors stand in place of the base's, each whole, rather than being added to them."""
    whole_module = False
    """Whether it is a module that is trained whole, such as a task head."""
    keys: Sequence[str] = ()
    """The names on disk of its tensors, below the module's path, where they are not a shape's or a method's."""

    def __init__(self, path: str, module: Any, adapter: str) -> None:
        self.path, self.module, self.adapter = path, module, adapter

    @property
    def name(self) -> str:
        """What tables call it: its module's name, or that of a weight where a module has several."""
        return self.path

    @classmethod
    def plan(cls, wanted: Any, modules: Mapping[str, nn.Module], faults: Faults) -> Iterable[Planned]:
        """The parts that a configuration asks for with `parts={"<name of the kind>": wanted}`.

        Args:
            modules: original name -> module.
            faults: takes everything that is wrong with `wanted`.
        """
        faults.add(f"parts of this kind are asked for by other fields of the configuration, not by {wanted!r}")
        return ()

    @classmethod
    @abstractmethod
    def at(cls, path: str, module: nn.Module) -> Iterator[Part]:
        """The parts of this kind at `module`, of whichever adapter."""

    @abstractmethod
    def attach(self, activity: Activity, planned: Any) -> nn.Module | None:
        """Put it on the module; what has to stand in the module's place then, where that is another one.

        Args:
            activity: of the model.
            planned: what the kind's planning came to; of a kind from outside a `Planned`.
        """

    @abstractmethod
    def tensors(self) -> Iterator[tuple[FactorSpec, Tensor]]:
        """Its tensors, each with its declaration."""

    @abstractmethod
    def remove(self, keep: bool = False) -> nn.Module | None:
        """Take it off the module; what has to stand in the module's place then, where that is another one.

        Args:
            keep: let what `replaces` a module stay in its place, as after a merge for good.
        """

    @abstractmethod
    def folds(self, others: Sequence[Part]) -> Iterator[Fold]:
        """What merging it, together with `others` of its kind and at its module, makes of the base's tensors.

        None for what goes on acting, or stays in place, whether merged or not.
        """

    def fit(self) -> None:
        """Give its tensors the sizes that the module has now: see fitting.py. Of most modules they never change."""
        return None

    def conflict(self, others: Sequence[Part]) -> str | None:
        """Why it cannot act together with `others`, of its kind and at its module; None where it can."""
        return None

    def refuse_resizing(self) -> str | None:
        """Why the tensors of its module cannot get another number of rows; None where `fit` knows what to do then."""
        return None

    @property
    def scales(self) -> bool:
        """Whether it has an update that `scale` can multiply. What stands in place of the base's tensors has none."""
        return False

    def scale(self, weight: float) -> None:
        """Multiply its update, where it `scales`."""
        raise StateError(f"{self.name}: it has no update to multiply.")

    def replaced(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(original name of a tensor of the base, what stands in its place, the base's), where it `replaces`."""
        return iter(())


def each_its_own(part: Part, others: Sequence[Part]) -> str:
    """What to say of parts that would stand in place of one another."""
    return f"{' and '.join(repr(p.adapter) for p in (part, *others))} each have their own"

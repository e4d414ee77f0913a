"""What an adapter owns at one place of a model: factors, a bias, or a whole module. Each kind answers for itself.

In: a module of an adapted model. Out: parts, which tell their tensors with the names that they have on disk, take
themselves off, and say which of them cannot act together. Saving, loading, deleting, counting and scaling are loops
over parts (`adapt.walk.parts`) and know no kinds. `PARTS` is the table of the kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import StateError
from .base import LoraLayer, end_layer
from .contract import FactorSpec
from .registry import Registry
from .replacement import BiasLayer, Replacement, end_bias, remove_bias
from .sharded import whole_shape


class Part(ABC):
    """One adapter's own at one module. It is made on a walk and holds no tensor: sharding and loading replace them.

    Args:
        path: original name of the module.
        module: the module itself; of a module that is kept whole, what stands in its place.
        adapter: the adapter's name.
    """

    replaces = False
    """Whether its tensors stand in place of the base's, rather than being added to them."""
    whole_module = False
    """Whether it is a module that is trained whole, such as a task head."""

    def __init__(self, path: str, module: Any, adapter: str) -> None:
        self.path, self.module, self.adapter = path, module, adapter

    @staticmethod
    @abstractmethod
    def adapters(module: nn.Module) -> Sequence[str]:
        """The adapters that have a part of this kind at `module`."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[FactorSpec, Tensor]]:
        """Its tensors, each with its declaration."""

    @abstractmethod
    def remove(self) -> nn.Module | None:
        """Take it off the module; what has to stand in the module's place then, where that is another one."""

    def conflict(self, others: Sequence[Part]) -> str | None:
        """Why it cannot act together with `others`, of its kind and at its module; None where it can."""
        return None

    def scale(self, weight: float) -> None:
        """Multiply its update.

        Raises:
            StateError: it `replaces` the base's tensors.
        """
        raise StateError(f"{self.path}: what stands in place of the base's tensors has no update to multiply.")


class Factors(Part):
    """The factors of an adapted layer."""

    @staticmethod
    def adapters(module: nn.Module) -> Sequence[str]:
        return module._lora.names if isinstance(module, LoraLayer) else ()

    def tensors(self) -> Iterator[tuple[FactorSpec, Tensor]]:
        specs = self.module._lora.adapters[self.adapter].specs
        for kind, factor in self.module.factors(self.adapter):
            yield specs[kind], factor.weight

    def remove(self) -> nn.Module | None:
        self.module.remove_lora(self.adapter)
        if not self.module._lora.names:
            end_layer(self.module)
        return None

    def conflict(self, others: Sequence[Part]) -> str | None:
        methods = [self.module._lora.adapters[part.adapter].method for part in (self, *others)]
        if all(method.additive for method in methods) and len({method.kind for method in methods}) == 1:
            return None
        listed = ", ".join(dict.fromkeys(method.kind for method in methods))
        return f"{self.path}: adapters of the methods {listed} cannot act on one layer together"

    def scale(self, weight: float) -> None:
        self.module._lora.adapters[self.adapter].scaling *= weight


class Bias(Part):
    """A bias of the adapter's own."""

    replaces = True

    @staticmethod
    def adapters(module: nn.Module) -> Sequence[str]:
        return module._bias_names if isinstance(module, BiasLayer) else ()

    def tensors(self) -> Iterator[tuple[FactorSpec, Tensor]]:
        weight = self.module.lora_bias[self.adapter].weight
        key = bias_key(self.adapter in Factors.adapters(self.module))
        yield FactorSpec(whole_shape(weight), key, "O"), weight

    def remove(self) -> nn.Module | None:
        remove_bias(self.module, self.adapter)
        if not self.module._bias_names:
            end_bias(self.module)
        return None

    def conflict(self, others: Sequence[Part]) -> str | None:
        return f"{self.path}.bias: {_each(self, others)}"


class Copy(Part):
    """A module that is kept whole: a task head, an entry of `modules_to_save`."""

    replaces = whole_module = True

    @staticmethod
    def adapters(module: nn.Module) -> Sequence[str]:
        return module._names if isinstance(module, Replacement) else ()

    def tensors(self) -> Iterator[tuple[FactorSpec, Tensor]]:
        for key, tensor in self.module.copies[self.adapter].state_dict(keep_vars=True).items():
            yield FactorSpec(whole_shape(tensor), key, trainable=isinstance(tensor, nn.Parameter)), tensor

    def remove(self) -> nn.Module | None:
        self.module.remove_copy(self.adapter)
        return None if self.module._names else self.module.base_layer

    def conflict(self, others: Sequence[Part]) -> str | None:
        return f"{self.path}: {_each(self, others)}"


def bias_key(adapted: bool) -> str:
    """A bias's name on disk, below its layer's path; PEFT names that of an adapted layer otherwise."""
    return "base_layer.bias" if adapted else "bias"


def _each(part: Part, others: Sequence[Part]) -> str:
    return f"{' and '.join(repr(p.adapter) for p in (part, *others))} each have their own"


PARTS: Registry[type[Part]] = Registry("kind of part", {"factors": Factors, "bias": Bias, "copy": Copy})

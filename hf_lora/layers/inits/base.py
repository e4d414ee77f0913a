"""The interface of initializations."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from ...errors import StateError
from ..contract import FactorSpec, Method, Shape, Storage
from .batches import Run


class InitCall(NamedTuple):
    """One site whose factors need values. Random numbers come from PyTorch's global generator, as for any model.

    Args:
        layer: the site, usually a layer.
        specs: the declaration of the factors.
        device: the device on which the layer computes.
        scaling: the scaling of B A.
        options: the rest of the initialization's name, such as `"niter_4"` of `"svd_niter_4"`.
        statistics: the result of its collector, if it `needs` one.
        original: returns the weight of the checkpoint, if it `needs` that.
    """

    layer: Any
    shape: Shape
    storage: Storage
    specs: Mapping[str, FactorSpec]
    device: torch.device
    scaling: float = 1.0
    options: str = ""
    statistics: Any = None
    original: Callable[[], Tensor] | None = None

    def zeros(self) -> dict[str, Tensor]:
        """Zeros in float32 for every factor."""
        return {n: torch.zeros(s.shape, dtype=torch.float32, device=self.device) for n, s in self.specs.items()}

    def read(self, rows: slice = slice(None)) -> Tensor:
        """A copy of rows of the weight in float32.

        Raises:
            StateError: the weight cannot be read, or has values that are not finite.
        """
        found = self.storage.read(self.layer, slice(*rows.indices(self.storage.shape(self.layer)[0])))
        if found.is_meta or not torch.isfinite(found).all():
            raise StateError(
                "The initialization reads the layer's weight, which is offloaded, holds NaN, or is assembled from "
                "several tensors of a file. Load the base into memory, without a device_map."
            )
        return found


class Collector(Protocol):
    """Observes one site while batches run. Its constructor registers the hooks."""

    def result(self) -> object:
        """Remove the hooks and return the statistics."""


class Init(ABC):
    """Initial values of the factors. Stateless: one instance per initialization."""

    in_files: bool | str | None = True
    """Value of `init_lora_weights` in saved configurations, which PEFT must accept: the factors in the file have their
    values already. None saves the name itself, as an initialization needs that `takes_out` and is `repeatable`."""
    takes_options: bool = False
    """Whether options may follow its name, after an underscore."""
    takes_out: bool = False
    """Whether its adapter acts on the base minus a product of two frozen factors, scaling · B0 A0.

    The base itself does not change: the product is subtracted only where the adapter acts. So disabling the adapter,
    unloading it and other adapters are exact.
    """
    repeatable: bool = True
    """Whether it computes the same product again from the weight alone. Then a file does not hold the product (as in
    PEFT), and loading computes it again. Otherwise a file holds it as further ranks: an adapter of rank 2 R."""
    settings: Mapping[str, Any] = {}
    """Its settings and their values; those of a configuration are in its field `<name>_config`, as in PEFT."""
    needs: ClassVar[Literal["nothing", "inputs", "gradients", "original"]] = "nothing"
    """What it needs in addition to the weight: statistics of batches, without or with gradients, or the weight of the
    checkpoint before quantization."""

    def refuse(self, layer: Any, shape: Shape) -> str | None:
        """Why the factors of a layer cannot be initialized this way; None if they can."""
        if self.needs in ("inputs", "gradients") and not isinstance(layer, nn.Module):
            return f"this weight is not a module, so its {self.needs} cannot be collected with hooks"
        return None

    def refuse_rank(self, layer: Any, shape: Shape, r: int) -> str | None:
        """Why factors of rank `r` cannot be initialized this way; None if they can."""
        return None

    def refuse_scaling(self, scaling: float) -> str | None:
        """Why factors with this scaling cannot be initialized this way; None if they can."""
        return None

    def refuse_options(self, options: str) -> str | None:
        """What to write instead of these options; None if they are known."""
        return None

    def refuse_settings(self, values: Mapping[str, Any]) -> str | None:
        """What is wrong with these settings; None if they are known."""
        unknown = [name for name in values if name not in self.settings]
        return f"unknown: {', '.join(unknown)}; known: {', '.join(self.settings)}" if unknown else None

    def with_settings(self, values: Mapping[str, Any]) -> Self:
        """The initialization with these settings."""
        if not values:
            return self
        found = copy.copy(self)
        found.settings = {**self.settings, **values}
        return found

    def refuse_method(self, method: Method) -> str | None:
        """Why it cannot start adapters of this method; None if it can."""
        if self.takes_out and not method.acts_everywhere:
            return "it subtracts a product from the base, on all tokens"
        if self.takes_out and not self.repeatable and not method.of_product:
            return (
                "it subtracts a product from the base that a file can hold only if the product of the factors is all "
                "that matters"
            )
        return None

    def with_options(self, options: str) -> Init:
        """The initialization with these options; itself, unless its attributes depend on them."""
        return self

    def of_file(self) -> Init | None:
        """The initialization of an adapter whose file names it, and so lacks the product that it `takes_out`.

        None if that product cannot be computed again.
        """
        return self if self.repeatable or not self.takes_out else None

    def declare(self, shape: Shape, specs: dict[str, FactorSpec]) -> dict[str, FactorSpec]:
        """The declaration of the factors, including the frozen ones if it `takes_out` a product."""
        if not self.takes_out:
            return specs
        found = dict(specs)
        for kind, sign in zip(shape.keys, (1, -1), strict=True):
            key = None if self.repeatable else specs[kind].key
            joins = 0 if self.repeatable else sign
            found[taken(kind)] = replace(specs[kind], key=key, trainable=False, joins=joins)
        return found

    def collect(self, layer: nn.Module) -> Collector:
        """Begin to observe one site."""
        raise NotImplementedError(f"{type(self).__name__} needs {self.needs} and has no collector")

    def observe(self, run: Run) -> dict[str, Any]:
        """Run the model on batches. Returns name of a site -> its statistics, which become `InitCall.statistics`.

        By default, each site has a collector, and all batches are run once.
        """
        collectors = {name: self.collect(call.layer) for name, call in run.calls.items()}
        for batch in run.batches:
            run.forward(batch, list(collectors))
        return {name: collector.result() for name, collector in collectors.items()}

    def ranks(self, statistics: Mapping[str, Any], wanted: Mapping[str, int], options: str) -> Mapping[str, int]:
        """Name of a site -> its rank, which may depend on the statistics; 0 means no adapter there."""
        return wanted

    def alpha(self, alpha: float, wanted: int, r: int) -> float:
        """The alpha of a site whose rank is `r` instead of `wanted`."""
        return alpha

    @abstractmethod
    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        """A value in float32 for each factor that `call.specs` declares."""


def taken(kind: str) -> str:
    """The name of the frozen factor that belongs to factor `kind`."""
    return f"{kind}0"


class Unset(Init):
    """Uninitialized memory, for factors that a file fills. Configurations cannot name it."""

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        return {n: torch.empty(s.shape, dtype=torch.float32, device=call.device) for n, s in call.specs.items()}

"""What an initialization is given, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ...errors import StateError
from ..contract import FactorSpec, Shape, Storage


class InitCall(NamedTuple):
    """One site whose factors want values. The draws come from PyTorch's global generator, as a model's own do.

    Args:
        layer: the site, a layer in most cases.
        specs: the declaration of the factors.
        device: where the layer computes.
        scaling: the factor in front of B A.
        options: what follows the initialization's name, such as `"niter_4"` of `"svd_niter_4"`.
        statistics: what its collector found, where it `needs` any.
        original: the weight as the checkpoint had it, where it `needs` that.
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
        """Every factor, of zeros, in float32."""
        return {n: torch.zeros(s.shape, dtype=torch.float32, device=self.device) for n, s in self.specs.items()}

    def read(self, rows: slice = slice(None)) -> Tensor:
        """Rows of the weight as it is, a copy in float32.

        Raises:
            StateError: there are no numbers to read.
        """
        found = self.storage.read(self.layer, slice(*rows.indices(self.storage.shape(self.layer)[0])))
        if found.is_meta or not torch.isfinite(found).all():
            raise StateError(
                "The initialization begins with the layer's weight, which is offloaded, holds NaN, or is put together "
                "from several tensors of a file. Load the base into memory, without a device_map."
            )
        return found


class Collector(Protocol):
    """Looks at one site while batches are run. It hooks the module by itself, as soon as it is made."""

    def result(self) -> Any:
        """The statistics; the hooks are off then."""


class Init(ABC):
    """Initial values of the factors. Stateless: one instance an initialization."""

    in_files: bool | str | None = True
    """What a saved configuration says instead of its name: a file's factors have their values, and PEFT knows only
    its own words. None for the name itself, as of one that `takes_out` and is `repeatable`."""
    takes_options: bool = False
    """Whether more may follow its name, after an underscore."""
    takes_out: bool = False
    """Whether it takes something out of the base, which its adapter alone then does without.

    The base stays as it is: what is taken out is a product of two frozen factors, scaling · B0 A0, that is subtracted
    where the adapter acts. So switching the adapter off, unloading it and other adapters are exact.
    """
    repeatable: bool = True
    """Whether it would take out the same again, from the weight alone. Then a file does not hold what was taken out,
    as PEFT's do not, and loading asks again. Else a file holds it as further ranks: an adapter of rank 2 R."""
    needs: ClassVar[Literal["nothing", "inputs", "gradients", "original"]] = "nothing"
    """What it has to be given besides the weight: statistics of batches without or with gradients, or the weight as
    the checkpoint had it, before it was quantised."""

    def refuse(self, layer: Any, shape: Shape) -> str | None:
        """Why a layer's factors cannot begin this way; None where they can."""
        if self.needs in ("inputs", "gradients") and not isinstance(layer, nn.Module):
            return f"no module is called with the {self.needs} of this weight alone"
        return None

    def declare(self, shape: Shape, specs: dict[str, FactorSpec]) -> dict[str, FactorSpec]:
        """The declaration of the factors with those of what it takes out."""
        if not self.takes_out:
            return specs
        found = dict(specs)
        for kind, sign in zip(shape.keys, (1, -1), strict=True):
            key = None if self.repeatable else specs[kind].key
            joins = 0 if self.repeatable else sign
            found[taken(kind)] = replace(specs[kind], key=key, trainable=False, joins=joins)
        return found

    def collect(self, layer: Any) -> Collector:
        """Begin to look at one site."""
        raise NotImplementedError(f"{type(self).__name__} needs {self.needs} and has no collector")

    def ranks(self, statistics: Mapping[str, Any], wanted: Mapping[str, int], options: str) -> Mapping[str, int]:
        """Name of a site -> its rank, which the statistics may decide; 0 leaves it without an adapter."""
        return wanted

    @abstractmethod
    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        """A value in float32 for each factor that `call.specs` declares."""


def taken(kind: str) -> str:
    """The name of the frozen factor that holds what was taken out by way of factor `kind`."""
    return f"{kind}0"


class Unset(Init):
    """Memory alone, and no draw: for factors that a file fills at once. No configuration names it."""

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        return {n: torch.empty(s.shape, dtype=torch.float32, device=call.device) for n, s in call.specs.items()}

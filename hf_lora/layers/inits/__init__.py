"""The initializations, one file each: the initial values of an adapter's factors.

In: an `InitCall` with the layer and the declaration of the factors. Out: a value for each factor. `INITS` maps their
names to them. `init_lora_weights` of a configuration holds such a name, or True or False, as in PEFT.
"""

from __future__ import annotations

from ..registry import Registry
from .base import Collector, Init, InitCall, Unset, taken
from .batches import Run
from .corda import Corda
from .decompositions import Olora, Pissa
from .eva import Eva
from .gaussian import Gaussian
from .kaiming import Kaiming
from .loftq import Loftq
from .lora_ga import LoraGA
from .mica import Mica
from .orthogonal import Orthogonal
from .random import Random

INITS: Registry[Init] = Registry(
    "initialization",
    {
        "kaiming": Kaiming(),
        "gaussian": Gaussian(),
        "random": Random(),
        "orthogonal": Orthogonal(),
        "pissa": Pissa(),
        "olora": Olora(),
        "loftq": Loftq(),
        "eva": Eva(),
        "corda": Corda(),
        "lora_ga": LoraGA(),
        "mica": Mica(),
    },
)

__all__ = ["INITS", "Collector", "Init", "InitCall", "Run", "Unset", "find_init", "init_name", "taken"]


def init_name(init: bool | str) -> str:
    """The name of an initialization, including its options, from a value of `init_lora_weights`."""
    return {True: "kaiming", False: "random"}[init] if isinstance(init, bool) else init


def find_init(init: bool | str) -> tuple[Init, str] | None:
    """The initialization that a value of `init_lora_weights` names, and its options; None if it is not registered."""
    name = init_name(init)
    if name in INITS:
        return INITS[name].with_options(""), ""
    stems = [stem for stem, entry in INITS.items() if entry.takes_options and name.startswith(f"{stem}_")]
    stem = max(stems, key=len, default=None)
    if stem is None:
        return None
    options = name[len(stem) + 1 :]
    return INITS[stem].with_options(options), options

"""The initializations, one file each: the first values of an adapter's factors.

In: an `InitCall`, which has the layer and the declaration of the factors. Out: a value for each factor. `INITS` is the
one list of their names; `init_lora_weights` of a configuration names one, and True and False are PEFT's words for two.
"""

from __future__ import annotations

from ..registry import Registry
from .base import Init, InitCall, Unset
from .gaussian import Gaussian
from .kaiming import Kaiming
from .random import Random

INITS: Registry[Init] = Registry("initialization", {"kaiming": Kaiming(), "gaussian": Gaussian(), "random": Random()})

__all__ = ["INITS", "Init", "InitCall", "Unset", "init_name"]


def init_name(init: bool | str) -> str:
    """The name in `INITS` of a value of `init_lora_weights`."""
    return {True: "kaiming", False: "random"}[init] if isinstance(init, bool) else init

"""The methods, one file each: how the factors of an adapter change a layer's output and weight.

In: a layer, the factors of a shape, the names of the active adapters. Out: the layer's output, or rows of its weight
with the update folded in. `METHODS` maps names to methods; the field `method` of a configuration holds such a name.
"""

from ..contract import Method
from ..registry import Registry
from .additive import Additive
from .alora import Alora
from .dora import Dora
from .lora_bias import LoraBias
from .lora_fa import LoraFA
from .lora_grouped import LoraGrouped

METHODS: Registry[Method] = Registry(
    "method",
    {
        "lora": Additive(),
        "dora": Dora(),
        "lora_bias": LoraBias(),
        "lora_fa": LoraFA(),
        "lora_grouped": LoraGrouped(),
        "alora": Alora(),
    },
)

__all__ = ["METHODS", "Additive"]

"""The methods, one file each: what the factors of an adapter do to a layer's output and to its weight.

In: a layer, a shape's factors, the names of the adapters that act. Out: the layer's output, or rows of its weight with
the update in them. `METHODS` is the table; a configuration names one of them in its field `method`.
"""

from ..contract import Method
from ..registry import Registry
from .additive import Additive

METHODS: Registry[Method] = Registry("method", {"lora": Additive()})

__all__ = ["METHODS", "Additive"]

"""What an adapter owns at one place of a model, a file a kind: factors, a bias, or a whole module.

In: a module of an adapted model. Out: parts, which tell their tensors with the names that they have on disk, attach
and take off what is theirs, say which of them cannot act together, and what merging makes of the base's tensors.
Saving, loading, deleting, merging, counting and scaling are loops over parts (`adapt.walk.parts`) and know no kinds.
`PARTS` is the table of the kinds.
"""

from __future__ import annotations

from ..registry import Registry
from .base import Fold, Part, Planned
from .bias import Bias, bias_key
from .copies import Copy
from .factors import Factors

__all__ = ["PARTS", "Bias", "Copy", "Factors", "Fold", "Part", "Planned", "bias_key"]

PARTS: Registry[type[Part]] = Registry("kind of part", {"factors": Factors, "bias": Bias, "copy": Copy})
"""Kind -> class, in the order in which they are attached and folded; one from outside comes after these."""

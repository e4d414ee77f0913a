"""What an adapter owns at one module, one file per kind: factors, a bias, or a whole module.

In: a module of an adapted model. Out: parts. A part lists its tensors with their names in files, attaches and removes
them, reports which parts conflict, and defines how merging changes the tensors of the base. Saving, loading, deleting,
merging, counting and scaling are loops over parts (`adapt.walk.parts`) of any kind. `PARTS` maps names to kinds.
"""

from __future__ import annotations

from ..registry import Registry
from .base import Fold, Part, Planned
from .bias import Bias, bias_key
from .copies import Copy
from .factors import Factors
from .token_rows import RowGroup, TokenRows, input_embedding, row_groups, rows_by_path

__all__ = [
    "PARTS", "Bias", "Copy", "Factors", "Fold", "Part", "Planned", "RowGroup", "TokenRows", "bias_key",
    "input_embedding", "row_groups", "rows_by_path",
]  # fmt: skip

PARTS: Registry[type[Part]] = Registry(
    "kind of part", {"factors": Factors, "bias": Bias, "copy": Copy, "token_rows": TokenRows}
)
"""Kind -> class, in the order in which they are attached and folded; kinds of other packages come last."""

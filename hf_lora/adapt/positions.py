"""The number of tokens that a model with learned positions reads.

Beyond it, the lookup in the table of positions fails with an index error, which on a GPU names neither the row nor the
cause. Models that compute their positions, such as rotary ones, have no such limit.

In: a model and its inputs. Out: an error that names the limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DataError
from .embeddings import input_embedding

_OFFSET = 2
"""At most so many rows of a table without a padding index are before the first position."""


class Positions(NamedTuple):
    """A table of positions.

    Args:
        tokens: the greatest number of tokens of a row.
        rows: of the table; with a padding index, the first position is behind it.
    """

    tokens: int
    rows: int


def learned_positions(model: nn.Module) -> Positions | None:
    """The table of positions of a transformers model; None for a model without one.

    It is found by its number of rows: that of the positions in the config, and a few more if they start later. A table
    of relative positions may have as many.
    """
    config = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
    window = getattr(config, "max_position_embeddings", None)
    if not isinstance(window, int):
        return None
    words = input_embedding(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module is words or name.rpartition(".")[2].startswith("rel"):
            continue
        if 0 <= module.num_embeddings - window <= _OFFSET:
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return Positions(min(window, module.num_embeddings - first), module.num_embeddings)
    return None


def check_positions(positions: Positions | None, inputs: Mapping[str, Any]) -> None:
    """Check that the table holds every position of a batch.

    Raises:
        DataError: a row is longer.
    """
    if positions is None:
        return
    own = inputs.get("position_ids")
    if own is not None:  # such as those of packed rows
        length = int(own.max()) + 1 if own.numel() else 0
        limit = positions.rows
    else:
        ids = [value for name, value in inputs.items() if name.endswith("input_ids") and isinstance(value, Tensor)]
        length = max((rows.shape[1] for rows in ids if rows.ndim == 2), default=0)
        limit = positions.tokens
    if length > limit:
        raise DataError(
            f"A row has {length:,} tokens, and the model has learned positions for {positions.tokens:,}. Truncate the "
            f"rows: tokenizer(…, truncation=True, max_length={positions.tokens}), or "
            f"max_length={positions.tokens} (--max-length {positions.tokens}) where hf_lora reads them."
        )

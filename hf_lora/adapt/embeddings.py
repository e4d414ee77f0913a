"""The token embeddings of a model, and their number of rows in memory and in the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from .walk import original_modules


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The output embedding of a language model, or None."""
    return _embedding(model, "get_output_embeddings")


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The token embedding of a transformers model, or None."""
    return _embedding(model, "get_input_embeddings")


def _embedding(model: nn.Module, getter: str) -> nn.Module | None:
    get = getattr(model, getter, None)
    try:
        found = get() if get else None
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None


def output_embeddings(model: nn.Module) -> list[nn.Module]:
    """The output embeddings of the model and of language models inside it."""
    found = (output_embedding(m) for _, m in original_modules(model) if hasattr(type(m), "get_output_embeddings"))
    return [m for m in found if m is not None]


def vocabulary_of(model: nn.Module) -> int | None:
    """Rows of the model's input embedding, or None."""
    return getattr(input_embedding(model), "num_embeddings", None)


def checkpoint_vocabulary(model: nn.Module) -> int | None:
    """Rows of the input embedding in the model's checkpoint, if its config is on this machine."""
    file = checkpoint_file(model, "config.json")
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError):
        return None
    inner = values.get("text_config")
    size = values.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, dict) else None)
    return size if isinstance(size, int) else None


def checkpoint_file(model: nn.Module, name: str) -> Path | None:
    """A file of the checkpoint that a model was loaded from, if it is on this machine."""
    from transformers.utils.hub import cached_file

    where = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not where:
        return None
    try:
        found = cached_file(
            where, name, local_files_only=True,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except (OSError, ValueError):
        return None
    return Path(found) if found else None

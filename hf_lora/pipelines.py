"""The transformers `pipeline` with an adapter."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import transformers

from .errors import StateError
from .hub.download import local_adapter
from .load import PROCESSORS, find_processor
from .model import LoraModel


def pipeline(task: str, adapter: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The transformers `pipeline` with an adapter. The adapter's config names the base. The tokenizer or processor
    comes from the adapter's folder if it has one, otherwise from the base.

    Args:
        task: a task of `transformers.pipeline`.
        adapter: a folder or a repository on the Hub.
        kwargs: arguments of `LoraModel.from_pretrained` and of `transformers.pipeline`.

    Raises:
        StateError: the task is to generate text, and the model does not, such as a classifier.
    """
    found = {k: kwargs.pop(k) for k in ("revision", "subfolder") if k in kwargs}
    common = {k: v for k, v in kwargs.items() if k in ("token", "cache_dir", "local_files_only")}
    folder = local_adapter(adapter, **found, **common)
    for_model = {"base_model", "merge", "base_revision", "allow_other_base", "dtype", "device_map", *common}
    model = LoraModel.from_pretrained(folder, **{k: v for k, v in kwargs.items() if k in for_model})
    if task == "text-generation" and not model.can_generate():
        raise StateError(
            f"pipeline({task!r}, {os.fspath(adapter)!r}): this is an adapter of a {type(model).__name__}, which does "
            'not generate text. Name its own task, such as "text-classification".'
        )
    rest = {k: v for k, v in kwargs.items() if k not in for_model}
    base = kwargs.get("base_model")
    base = base if isinstance(base, (str, os.PathLike)) else model.config._name_or_path
    for part, auto in PROCESSORS.items():
        if part not in rest:
            processor = find_processor(auto, folder, base)
            if processor is not None:
                rest[part] = processor
    make: Any = transformers.pipeline
    with _any_class():
        return make(task, model=model, **rest)


@contextlib.contextmanager
def _any_class() -> Iterator[None]:
    """Without the error that transformers logs, with all classes it knows, for a classifier on the sentence vector."""
    logger = logging.getLogger("transformers.pipelines.base")

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not ("The model 'Pooled" in message and "not supported for text-classification" in message)

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)

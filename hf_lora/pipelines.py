"""transformers' `pipeline` over an adapter."""

from __future__ import annotations

import os
from typing import Any

import transformers

from .hub.download import local_adapter
from .load import PROCESSORS, find_processor
from .model import LoraModel


def pipeline(task: str, adapter: str | os.PathLike[str], **kwargs: Any) -> Any:
    """transformers' `pipeline` on an adapter. The base is found from the adapter's config; the tokenizer or processor
    comes from the adapter's folder where it holds one, else from the base.

    Args:
        task: a task of `transformers.pipeline`.
        adapter: a folder, or a repository on the Hub.
        kwargs: those of `LoraModel.from_pretrained` go there, others to transformers' pipeline.
    """
    found = {k: kwargs.pop(k) for k in ("revision", "subfolder") if k in kwargs}
    common = {k: v for k, v in kwargs.items() if k in ("token", "cache_dir", "local_files_only")}
    folder = local_adapter(adapter, **found, **common)
    own = {"base_model", "merge", "base_revision", "allow_other_base", "dtype", "device_map", *common}
    model = LoraModel.from_pretrained(folder, **{k: v for k, v in kwargs.items() if k in own})
    rest = {k: v for k, v in kwargs.items() if k not in own}
    base = kwargs.get("base_model")
    base = base if isinstance(base, (str, os.PathLike)) else model.config._name_or_path
    for part, auto in PROCESSORS.items():
        if part not in rest:
            processor = find_processor(auto, folder, base)
            if processor is not None:
                rest[part] = processor
    make: Any = transformers.pipeline
    return make(task, model=model, **rest)

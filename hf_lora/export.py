"""Write a merged model to a folder: a full model that every tool can load, with no trace of the adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .errors import AdapterFileError, ConfigError, MergeError, nearest
from .files.format import CONFIG_NAME
from .hub.download import local_adapter
from .layers.storages import fits
from .load import PROCESSORS, find_processor
from .model import LoraModel

DTYPES = ("float32", "bfloat16", "float16")


def merge_to_folder(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base_model: Any = None,
    dtype: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    **kwargs: Any,
) -> Path:
    """Load an adapter with its base, fold it in, and save the full model with its tokenizer or processor.

    Args:
        adapter: a folder, or a repository on the Hub.
        out: the folder to write; it must be new or empty unless `overwrite`.
        base_model: a model, or its folder or repository; None takes the one that the adapter's config names.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`: the fold is then done on float32 weights (4 bytes a parameter
            of memory) and rounded once. None keeps the checkpoint's.
        allow_nonfinite: write the model even where a weight is NaN or infinite.
        kwargs: for `LoraModel.from_pretrained`.

    Returns:
        The folder.

    Raises:
        ConfigError: `dtype` is none of the three, or is given beside a `quantization_config`, which has its own.
        AdapterFileError: the folder is not empty, or holds an adapter; or the adapter cannot be loaded.
        MergeError: the adapter cannot be folded, or a weight is not finite. Nothing was written.
    """
    folder = Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown{nearest(dtype, DTYPES)}. It is one of {', '.join(DTYPES)}.")
    if dtype is not None and kwargs.get("quantization_config") is not None:
        raise ConfigError("dtype= is for dense weights. Leave it out, or leave out quantization_config.")
    check_new_folder(folder, overwrite)
    if isinstance(base_model, (str, os.PathLike)) and folder.resolve() == Path(base_model).resolve():
        raise AdapterFileError(f"{folder} is the base model's own folder. Name another one.")
    found = {name: kwargs.pop(name) for name in ("revision", "subfolder") if name in kwargs}
    common = {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs}
    source = local_adapter(adapter, **found, **common)
    loading = "float32" if dtype is not None else None
    model = LoraModel.from_pretrained(source, base_model=base_model, merge=True, dtype=loading, **kwargs)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    floats = [(n, p.detach()) for n, p in model.named_parameters() if p.is_floating_point() and not p.is_meta]
    broken = [name for name, weight in floats if not fits(weight, weight.dtype)]
    if broken and not allow_nonfinite:
        raise MergeError(
            f"merge_to_folder({str(adapter)!r}, {str(out)!r}): {len(broken)} weights hold NaN or infinity, such as "
            f"{', '.join(broken[:5])}. Nothing was written. A wider dtype may hold them; allow_nonfinite=True writes "
            "them as they are."
        )
    model.save_pretrained(folder)
    base = base_model if isinstance(base_model, (str, os.PathLike)) else model.config._name_or_path
    for auto in PROCESSORS.values():
        processor = find_processor(auto, source, base)
        if processor is not None:
            processor.save_pretrained(folder)
    return folder


def check_new_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> None:
    """See that a folder can be written without mixing its files with others.

    Raises:
        AdapterFileError: it is a file, it is not empty (unless `overwrite`), or it holds an adapter.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise AdapterFileError(f"{path} is a file. Name a folder.")
    if (path / CONFIG_NAME).exists():
        raise AdapterFileError(f"{path} holds an adapter ({CONFIG_NAME}). Name another folder.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise AdapterFileError(f"{path} is not empty. Name a new folder, or pass --overwrite (overwrite=True).")

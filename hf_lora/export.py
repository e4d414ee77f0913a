"""Merge an adapter, from a folder or the Hub, into a full model that every tool can load, or summarize it."""

from __future__ import annotations

import os
from pathlib import Path
from types import NoneType
from typing import Any

from .errors import AdapterFileError, ConfigError, MergeError
from .file_merge.stream import DTYPES, check_dtype, merge_files
from .files.convert import check_new_folder
from .files.format import read_config
from .files.inspect import AdapterSummary, inspect_folder
from .hub.base import local_base
from .hub.download import local_adapter
from .hub.names import check_base
from .layers.storages import fits
from .load import PROCESSORS, find_processor
from .model import LoraModel

__all__ = ["DTYPES", "inspect_adapter", "merge_to_folder"]


def inspect_adapter(
    adapter: str | os.PathLike[str], *, revision: str | None = None, subfolder: str | None = None
) -> AdapterSummary:
    """Summarize an adapter's file layer by layer, without the base model; `str()` of the result is a table.

    Args:
        adapter: a folder, or a repository on the Hub.
        revision: branch, tag or commit of the repository.
        subfolder: subfolder of the adapter in the folder or repository.

    Raises:
        AdapterFileError: a file is missing or malformed, or a layer lacks one of its factors.
        HubError: the repository could not be reached or read.
    """
    return inspect_folder(local_adapter(adapter, revision, subfolder=subfolder))


def merge_to_folder(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base_model: Any = None,
    in_memory: bool = True,
    dtype: str | None = None,
    untie: bool = False,
    overwrite: bool = False,
    allow_other_base: bool = False,
    allow_nonfinite: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    base_revision: str | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Path:
    """Save a base model with an adapter folded in, and its tokenizer or processor, and return the folder.

    Args:
        adapter: a folder, or a repository on the Hub.
        out: the folder to write; it must be new or empty unless `overwrite`.
        base_model: a model, or its folder or repository. Default: the one in the adapter's config.
        in_memory: load the model, whatever its file format. False: merge its safetensors files one by one, with little
            memory, as `merge_files` does; if that was interrupted, the same call resumes.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`: the fold then uses float32 weights (in memory 4 bytes per
            parameter) and rounds once. Default: the checkpoint's.
        untie: give an adapted layer that shares its weight with another a separate copy.
        allow_other_base: merge into another base than the adapter was trained on.
        allow_nonfinite: write the model even if a weight is NaN or infinite; only in memory.
        revision: of the adapter, as in `inspect_adapter`.
        subfolder: the same.
        base_revision: like `revision`, for the base. Default: the commit that the adapter was trained on.
        progress: show bytes and rate if the output is a terminal; only with `in_memory=False`.
        kwargs: for `LoraModel.from_pretrained`; only in memory.

    Raises:
        ConfigError: `dtype` is not one of the three, or arguments contradict each other.
        AdapterFileError: the folder is not empty, or has an adapter; or the adapter could not be loaded.
        MergeError: the adapter cannot be folded, or a weight is not finite. Nothing was written.
    """
    check_dtype(dtype)
    if not os.fspath(out):
        raise ConfigError("merge_to_folder: out is empty. Name a folder.")
    if in_memory:
        if dtype is not None and kwargs.get("quantization_config") is not None:
            raise ConfigError("dtype= is for dense weights. Omit it, or omit quantization_config.")
        check_new_folder(out, overwrite)
        common = {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs}
        source = local_adapter(adapter, revision, subfolder=subfolder, **common)
        _check_base(source, out, base_model, base_revision)
        kwargs |= {"untie": untie, "allow_other_base": allow_other_base, "base_revision": base_revision}
        return _merge_in_memory(source, Path(out), base_model, dtype, allow_nonfinite, kwargs)
    if wrong := [*kwargs, *(["allow_nonfinite"] if allow_nonfinite else [])]:
        raise ConfigError(f"merge_to_folder: {', '.join(wrong)} need in_memory=True.")
    source = local_adapter(adapter, revision, subfolder=subfolder)
    _check_base(source, out, base_model, base_revision)
    base = base_model or read_config(source).base_model_name_or_path
    if not isinstance(base, (str, os.PathLike)):
        raise ConfigError("merge_to_folder: with in_memory=False, base_model= must be a folder or a repository.")
    folder = local_base(base, base_revision, adapter=source)
    return merge_files(
        folder, source, out, dtype=dtype, untie=untie, overwrite=overwrite, allow_other_base=allow_other_base,
        progress=progress,
    )  # fmt: skip


def _check_base(adapter: Path, out: str | os.PathLike[str], base_model: Any, revision: str | None) -> None:
    """Refuse to replace the base, and a name or revision of it that has no effect."""
    named = read_config(adapter).base_model_name_or_path if base_model is None else base_model
    if isinstance(named, (str, os.PathLike)):
        check_base(os.fspath(named), revision, "merge_to_folder", given=base_model is not None)
        if Path(out).resolve() == Path(named).resolve():
            raise AdapterFileError(f"{out} is the folder of the base model. Name another one.")


def _merge_in_memory(
    adapter: Path, out: Path, base_model: Any, dtype: str | None, allow_nonfinite: bool, kwargs: dict[str, Any]
) -> Path:
    loading = "float32" if dtype is not None and isinstance(base_model, (str, os.PathLike, NoneType)) else None
    model = LoraModel.from_pretrained(adapter, base_model=base_model, merge=True, dtype=loading, **kwargs)
    if dtype is not None:
        model = model.to(DTYPES[dtype])
    floats = [(n, p.detach()) for n, p in model.named_parameters() if p.is_floating_point() and not p.is_meta]
    broken = [name for name, weight in floats if not fits(weight, weight.dtype)]
    if broken and not allow_nonfinite:
        raise MergeError(
            f"merge_to_folder({str(adapter)!r}, {str(out)!r}): {len(broken)} weights hold NaN or infinity, such as "
            f"{', '.join(broken[:5])}. Nothing was written. Try a wider dtype, or write them unchanged with "
            "allow_nonfinite=True."
        )
    model.save_pretrained(out)
    base = base_model if isinstance(base_model, (str, os.PathLike)) else model.config._name_or_path
    for auto in PROCESSORS.values():
        processor = find_processor(auto, adapter, base)
        if processor is not None:
            processor.save_pretrained(out)
    return out

"""Convert adapters from old versions of other libraries, which saved tensors as a pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AdapterFileError
from ..safe_io.atomic import why_not_writable
from ..safe_io.reading import own_file, read_json
from .format import (
    CONFIG_NAME,
    LEGACY_WEIGHTS_NAME,
    AdapterFile,
    read_adapter,
    read_config,
    read_extras,
    write_adapter,
)


def convert_adapter(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False
) -> AdapterFile:
    """Convert an old adapter, whose tensors are a pickle, to safetensors.

    The pickle is read with `weights_only=True`, so it can contain only tensors and no code.

    Args:
        folder: contains `adapter_model.bin` and `adapter_config.json`.
        out: the folder to write.
        overwrite: write into a folder that is not empty; one with an adapter is always refused.

    Returns:
        The new adapter: `path`, `config` and `tensors`.

    Raises:
        AdapterFileError: the folder has no such adapter, its pickle has more than tensors, or `out` is not empty.
    """
    check_new_folder(out, overwrite)
    path = Path(folder)
    read_config(path)
    weights = path / LEGACY_WEIGHTS_NAME
    file = own_file(path, LEGACY_WEIGHTS_NAME)
    if file is None:
        raise AdapterFileError(f"{path} has no {LEGACY_WEIGHTS_NAME}: nothing to convert.")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError …
        lines = str(error).splitlines() or [""]
        why = next((line.strip() for line in lines if line.startswith("Unsupported")), lines[0].partition(". ")[0])
        raise AdapterFileError(
            f"{weights} could not be read as a file with only tensors ({type(error).__name__}: {why}). Copy it again."
        ) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise AdapterFileError(f"{weights} contains more than tensors.")
    values = read_json(path, CONFIG_NAME) or {}
    write_adapter(out, values, tensors, read_extras(path))
    return read_adapter(out)


def check_new_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Check that a folder can be written without mixing files.

    Raises:
        AdapterFileError: it is a file, it is not empty (unless `overwrite`), it holds an adapter, or nothing can be
            written there.
    """
    path = Path(folder)
    if not os.fspath(folder):
        raise AdapterFileError("The name of the folder is empty. Name a folder.")
    if path.exists() and not path.is_dir():
        raise AdapterFileError(f"{path} is a file. Name a folder.")
    if (path / CONFIG_NAME).exists():
        raise AdapterFileError(f"{path} holds an adapter ({CONFIG_NAME}). Name another folder.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise AdapterFileError(f"{path} is not empty. Name a new folder, or pass --overwrite (overwrite=True).")
    reason = why_not_writable(path)
    if reason is not None:
        raise AdapterFileError(f"{path}: {reason}. Name another folder.")

"""The file format: PEFT's adapter format and `hf_lora.json`. File names are defined here alone, keys in keys.py.

    adapter_config.json           the configuration, in PEFT's fields
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight and so on, float32
    hf_lora.json                  base identity, architecture, labels, vocabulary, versions

They are replaced together: a failed or killed save leaves the old files or the new ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from ..adapt.request import check_names
from ..config import ALL_LINEAR, LoraConfig
from ..errors import AdapterFileError, ConfigError, Faults, nearest
from ..layers.contract import FactorSpec
from ..layers.distributed import scatter
from ..layers.parts import Part
from ..layers.storages import fits
from ..safe_io.atomic import finish_moves, replace_together
from ..safe_io.headers import TensorFile, read_header
from ..safe_io.reading import REPAIR, own_file, read_json
from .foreign import split_base_copies, with_plain_keys
from .initializations import read_init
from .joined import under_first_names, with_first_names
from .keys import key_of, matrices, split_key
from .validate import check_config, check_extras

logger = logging.get_logger(__name__)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LEGACY_WEIGHTS_NAME = "adapter_model.bin"
EXTRAS_NAME = "hf_lora.json"
NEW_TOKENS = ("new_embeddings.safetensors", "new_embeddings.bin")
"""Files beside an adapter in which some libraries keep the embeddings of added tokens."""
FULL_MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The floating-point dtypes that an adapter's tensors may have."""


@dataclass
class AdapterFile:
    """An adapter on disk: its configuration, its tensors by file key, and the content of hf_lora.json."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    extras: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()
    raw: dict[str, Any] = field(default_factory=dict)
    """adapter_config.json as it was read."""
    base_copies: dict[str, Tensor] = field(default_factory=dict)
    """Module -> a copy of the base's weight, if another library saved one."""


@dataclass
class Stored:
    """One tensor of an adapter's file, and the tensors in memory that it consists of: one, or several joined."""

    key: str
    members: list[tuple[FactorSpec, Tensor]]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.members[0][0].shape_on_disk)
        if len(self.members) > 1:
            shape[self._axis] = sum(self._sizes())
        return tuple(shape)

    def value(self, gathered: Mapping[int, Tensor] | None = None) -> Tensor:
        """The value in the file; a single tensor that is saved unchanged is returned itself.

        Args:
            gathered: id of a tensor -> its replacement.
        """
        found = [spec.to_disk((gathered or {}).get(id(tensor), tensor)) for spec, tensor in self.members]
        if len(found) == 1:
            return found[0]
        signs = (spec.joins or 1 for spec, _ in self.members)
        return torch.cat([sign * tensor.detach() for sign, tensor in zip(signs, found, strict=True)], self._axis)

    def put(self, value: Tensor) -> None:
        """Copy the value from a file into the tensors in memory. All processes must call it."""
        pieces = [value] if len(self.members) == 1 else value.split(self._sizes(), self._axis)
        for (spec, held), piece in zip(self.members, pieces, strict=True):
            scatter(held, spec.from_disk(piece * spec.joins if spec.joins else piece))

    @property
    def _axis(self) -> int:
        return self.members[0][0].axes.index("R")

    def _sizes(self) -> list[int]:
        return [spec.shape_on_disk[self._axis] for spec, _ in self.members]


def stored(parts: Iterable[Part]) -> dict[str, Stored]:
    """File key -> its tensors, for everything that is saved in an adapter's file.

    Raises:
        AdapterFileError: two tensors have the same key.
    """
    found: dict[str, Stored] = {}
    for part in parts:
        for spec, tensor in part.tensors():
            if spec.key is None:
                continue
            key = key_of(part.path, spec.key)
            if key in found and not spec.joins:
                raise AdapterFileError(f"Two tensors of the adapter {part.adapter!r} have the same file key {key}.")
            found.setdefault(key, Stored(key, [])).members.append((spec, tensor))
    return found


def compare(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], faults: Faults) -> None:
    """Add a fault for every tensor that is missing, unexpected, not finite, or has the wrong shape."""
    absent, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()

    def hint(key: str, known: Iterable[str]) -> str:
        return nearest(key, known, 1) if len(faults.found) < faults.LISTED else ""

    for key, shape in expected.items():
        if key in absent:
            faults.add(f"missing: {key} {list(shape)}{hint(key, extra)}")
        elif tuple(tensors[key].shape) != tuple(shape):
            faults.add(f"shape: {key} is {list(tensors[key].shape)} in the file, {list(shape)} in the model")
    for key, tensor in tensors.items():
        if key in extra:
            faults.add(f"unexpected: {key} {list(tensor.shape)}{hint(key, absent)}")
        elif tensor.shape != expected[key]:
            continue  # its values are not read, since it may have any size
        elif tensor.is_floating_point() and not fits(tensor, torch.float32):
            faults.add(f"values: {key} holds NaN or infinity")


def compare_kinds(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], faults: Faults) -> None:
    """Add a fault for every integer tensor where floating-point numbers are expected, or the reverse."""
    for key, tensor in tensors.items():
        if key in expected and tensor.is_floating_point() != expected[key].is_floating_point():
            faults.add(f"kind: {key} holds {tensor.dtype} in the file, {expected[key].dtype} in the model")


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter's folder.

    Raises:
        AdapterFileError: a file is missing, truncated or malformed; the message names it and what to do.
    """
    path = Path(folder)
    config, raw, extras = _read_configs(path)
    weights = path / WEIGHTS_NAME
    file = own_file(path, WEIGHTS_NAME)
    if file is None:
        if (path / LEGACY_WEIGHTS_NAME).is_file():
            raise AdapterFileError(
                f"{path} holds {LEGACY_WEIGHTS_NAME}, a pickle. Convert it once: hf-lora convert {path} --out FOLDER"
            )
        raise AdapterFileError(f"{path} has {CONFIG_NAME} but no {WEIGHTS_NAME}: the adapter is incomplete.")
    _check_entries(read_header(file, weights))
    for name in NEW_TOKENS:
        if (path / name).exists():
            raise AdapterFileError(
                f"{path} has {name}, the embeddings of tokens that were added to the base, which cannot be loaded. "
                "Load the adapter with the library that wrote it."
            )
    try:
        tensors = load_file(file)
    except (SafetensorError, ValueError, OSError, RuntimeError, MemoryError) as error:  # torch maps it
        raise AdapterFileError(f"{weights} is not a complete safetensors file ({error}). {REPAIR}") from error
    own, copies = split_base_copies(under_first_names(with_plain_keys(tensors), extras.get("joined") or {}))
    return AdapterFile(config, own, extras, path, raw, copies)


def _check_entries(file: TensorFile) -> None:
    """Check that factors are floating-point matrices and that nothing is empty."""
    if not file.entries:
        raise AdapterFileError(f"{file.path} holds no tensors.")
    faults = Faults(str(file.path))
    for key, dtype, shape, *_ in file.entries:
        role = split_key(key)[1]
        if 0 in shape:
            faults.add(f"{key} {list(shape)} is empty")
        if dtype not in FLOATS and (dtype.is_floating_point or role != "copy"):
            faults.add(f"{key} holds {dtype}, not one of {', '.join(map(str, FLOATS))}")
        if role in matrices() and len(shape) < 2:
            faults.add(f"{key} {list(shape)} is not a matrix")
    faults.check(AdapterFileError, REPAIR)


def holds_adapter(folder: object) -> bool:
    """Whether a folder holds an adapter, and no full model."""
    place = os.fspath(folder) if isinstance(folder, (str, os.PathLike)) else ""
    has = [os.path.isfile(os.path.join(place, name)) for name in (CONFIG_NAME, "config.json")]
    return has == [True, False]


def read_config(path: Path) -> LoraConfig:
    """The adapter_config.json of a folder."""
    return _read_configs(path)[0]


def _read_configs(path: Path) -> tuple[LoraConfig, dict[str, Any], dict[str, Any]]:
    """The configuration of a folder, its adapter_config.json as it was read, and its hf_lora.json."""
    file = path / CONFIG_NAME
    _finish(path)
    values = read_json(path, CONFIG_NAME)
    if values is None:
        inner = sorted(p.parent.name for p in path.glob(f"*/{CONFIG_NAME}")) if path.is_dir() else []
        also = f" Its subfolders {', '.join(inner)} hold adapters: name one of them." if inner else ""
        if (path / "config.json").is_file():
            also = (
                " It holds a full model: load it with transformers, or with hf_lora.build_classifier if it was merged "
                "from a classifier on the sentence vector."
            )
        there = "is not an adapter's folder" if path.is_dir() else "does not exist"
        raise AdapterFileError(f"{path} {there} (no {CONFIG_NAME}).{also or ' Name the folder of a saved adapter.'}")
    check_config(values, str(file))
    try:
        config = LoraConfig.from_dict(_with_targets(path, values), call=str(file))
    except ConfigError as error:
        raise AdapterFileError(str(error), error.faults) from error
    faults = Faults(str(file))
    step = read_init(config, faults)
    check_names(config, faults)
    faults.check(
        AdapterFileError, step or "Import the package that registers these, or load it with the library that wrote it."
    )
    extras = read_extras(path, values)
    config.task_type = config.task_type or extras.get("task_type")
    if config.method == "lora":
        config.method = extras.get("method", config.method)
    return with_first_names(config, extras.get("joined") or {}), values, extras


def _with_targets(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The values, with the layers that the weights file adapts if another library's file leaves them to a table."""
    file = path / WEIGHTS_NAME
    if values.get("target_modules", ...) not in (None, ALL_LINEAR) or (path / EXTRAS_NAME).exists():
        return values
    keys = [split_key(entry.name) for entry in read_header(file).entries] if file.is_file() else []
    layers = sorted({layer for layer, role in keys if role not in ("copy", "bias")})
    return values | {"target_modules": layers} if layers else values


def _finish(path: Path) -> None:
    """Finish an interrupted save into this folder."""
    try:
        finish_moves(path)
    except OSError as error:
        raise AdapterFileError(
            f"{path} has an interrupted save, but the folder is not writable, so it could not be finished ({error}). "
            "Copy the folder to a writable place and load the copy."
        ) from error


def read_extras(path: Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The hf_lora.json of a folder; empty if another library wrote the adapter.

    Args:
        config: the folder's adapter_config.json, if the caller has read it.
    """
    values = read_json(path, EXTRAS_NAME)
    if values is None:
        return {}
    if "peft_version" in (
        config or read_json(path, CONFIG_NAME) or {}
    ):  # PEFT replaced the adapter, and left this file
        logger.info(f"{path}: {EXTRAS_NAME} is of an earlier adapter, which PEFT has replaced; it is ignored.")
        return {}
    check_extras(values, str(path / EXTRAS_NAME))
    return values


def write_adapter(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    extras: Mapping[str, Any],
    allow_nonfinite: bool = False,
) -> Path:
    """Write an adapter's three files, which are replaced together.

    Args:
        allow_nonfinite: also write NaN and infinity, for debugging. Loading refuses such a file.

    Raises:
        AdapterFileError: a tensor is not finite or empty (a parameter that was not gathered), or no space is left.
            Existing files are unchanged.
    """
    path = Path(folder)
    faults = Faults(f"saving an adapter to {path}")
    ready = {}
    for key, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.is_meta:
            faults.add(f"{key} is empty here: gather sharded parameters first")
        elif not allow_nonfinite and tensor.is_floating_point() and not fits(tensor, tensor.dtype):
            faults.add(f"{key} holds NaN or infinity")
        else:
            ready[key] = tensor.detach().to("cpu").contiguous()
    faults.check(AdapterFileError, "Nothing was written; existing files are unchanged.")
    path.mkdir(parents=True, exist_ok=True)
    ready = _unshared(ready)
    writers: dict[str, Callable[[Path], object]] = {
        WEIGHTS_NAME: lambda file: save_file(ready, file, metadata={"format": "pt"}),
        EXTRAS_NAME: lambda file: file.write_text(_json(extras), encoding="utf-8"),
        CONFIG_NAME: lambda file: file.write_text(_json(dict(sorted(config.items())), False), encoding="utf-8"),
    }
    replace_together(path, writers)
    return path


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clone tensors that share memory, which safetensors refuses."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return result


def _json(values: Mapping[str, Any], sort_keys: bool = True) -> str:
    """Tables of patterns must keep their order: the first that matches applies."""
    return json.dumps(values, indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False) + "\n"

"""The names on disk: PEFT's adapter format, and `hf_lora.json` beside it. No other file knows them.

    adapter_config.json           the configuration, in PEFT's fields
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight and so on, float32
    hf_lora.json                  base identity, architecture, labels, vocabulary, versions

They take their places together: a failed or killed save leaves the old ones or the new ones.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapt.targets import check_names
from ..config import LoraConfig
from ..errors import AdapterFileError, ConfigError, Faults, nearest
from ..layers.contract import FactorSpec, Method, Shape
from ..layers.distributed import scatter
from ..layers.methods import METHODS
from ..layers.parts import PARTS, Part
from ..layers.shapes import SHAPES
from ..layers.storages import fits
from ..safe_io.atomic import finish_moves, replace_together
from ..safe_io.headers import TensorFile, read_header
from ..safe_io.reading import REPAIR, own_file, read_json
from .validate import check_config, check_extras

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LEGACY_WEIGHTS_NAME = "adapter_model.bin"
EXTRAS_NAME = "hf_lora.json"
PREFIX = "base_model.model."
_PEFT_WRAPPER = re.compile(r"(.+?)\.(original_module|modules_to_save)\.(.+)")
FULL_MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The floating-point dtypes that an adapter's tensors may have."""


@dataclass
class AdapterFile:
    """An adapter as it lies on disk: its configuration, its tensors by file key, and what is ours alone."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    extras: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()
    raw: dict[str, Any] = field(default_factory=dict)
    """adapter_config.json as it was read."""
    base_copies: dict[str, Tensor] = field(default_factory=dict)
    """Module -> the base's weight, where another library put a copy of it into the file."""


def key_of(path: str, key: str) -> str:
    """The file key of a tensor that a part at module `path` declares as `key`."""
    return f"{PREFIX}{path}.{key}"


def split_key(key: str) -> tuple[str, str]:
    """(path, role) of a file key: a factor's name, "bias" (whose path is its layer's), or "copy" (its own path).

    What a kind of part from outside declares counts as a copy: it has no update of its own to sum up.
    """
    path = key.removeprefix(PREFIX)
    if any(path.endswith(f".{suffix}") for kind in PARTS.values() for suffix in kind.keys):
        return path, "copy"
    for suffix, factor in factor_keys():
        if path.endswith(f".{suffix}"):
            return path.removesuffix(f".{suffix}"), factor
    module, _, last = path.rpartition(".")
    module, _, role = module.rpartition(".")
    if role.startswith("lora_") and last == "weight":
        return module, role  # of a method that nobody has registered: a factor all the same
    return (module, "bias") if role == "base_layer" and last == "bias" else (path, "copy")


def factor_keys() -> Iterator[tuple[str, str]]:
    """(name on disk, below a module's path, factor) of all that the registered shapes and methods declare."""
    tables: tuple[Shape | Method, ...] = (*SHAPES.values(), *METHODS.values())
    for declaring in tables:
        for factor, suffix in declaring.keys.items():
            yield suffix, factor


def matrices() -> tuple[str, ...]:
    """The names of the factors whose product is the update: (R, I) first."""
    return tuple(Shape.keys)


def factors_of(config: LoraConfig) -> tuple[str, ...]:
    """The names of all factors that a layer of such an adapter has in a file."""
    return (*matrices(), *METHODS[config.method].keys)


@dataclass
class Stored:
    """One tensor of an adapter's file, and the tensors in memory that it is made of: one, or several that join."""

    key: str
    members: list[tuple[FactorSpec, Tensor]]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.members[0][0].shape_on_disk)
        if len(self.members) > 1:
            shape[self._axis] = sum(self._sizes())
        return tuple(shape)

    def value(self, gathered: Mapping[int, Tensor] | None = None) -> Tensor:
        """What the file holds; of one tensor that is written as it is, that very tensor.

        Args:
            gathered: id of a tensor -> the one to take in its place.
        """
        found = [spec.to_disk((gathered or {}).get(id(tensor), tensor)) for spec, tensor in self.members]
        if len(found) == 1:
            return found[0]
        signs = (spec.joins or 1 for spec, _ in self.members)
        return torch.cat([sign * tensor.detach() for sign, tensor in zip(signs, found, strict=True)], self._axis)

    def put(self, value: Tensor) -> None:
        """Write what a file holds into the tensors in memory. All processes call it."""
        pieces = [value] if len(self.members) == 1 else value.split(self._sizes(), self._axis)
        for (spec, held), piece in zip(self.members, pieces, strict=True):
            scatter(held, spec.from_disk(piece * spec.joins if spec.joins else piece))

    @property
    def _axis(self) -> int:
        return self.members[0][0].axes.index("R")

    def _sizes(self) -> list[int]:
        return [spec.shape_on_disk[self._axis] for spec, _ in self.members]


def stored(parts: Iterable[Part]) -> dict[str, Stored]:
    """File key -> what it is made of, of all that goes into an adapter's file.

    Raises:
        AdapterFileError: two tensors have one key.
    """
    found: dict[str, Stored] = {}
    for part in parts:
        for spec, tensor in part.tensors():
            if spec.key is None:
                continue
            key = key_of(part.path, spec.key)
            if key in found and not spec.joins:
                raise AdapterFileError(f"Two tensors of the adapter {part.adapter!r} would be called {key} in a file.")
            found.setdefault(key, Stored(key, [])).members.append((spec, tensor))
    return found


def split_base_copies(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the adapter's tensors, module -> weight) of what PEFT puts in a file.

    Beside an adapted embedding or output embedding PEFT puts a copy of the base's weight; with trained biases it
    writes those of whole modules twice more, under its wrapper's names.
    """
    own: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    suffixes = {suffix for suffix, _ in factor_keys()}
    for key, tensor in tensors.items():
        path = key.removesuffix(".base_layer.weight")
        if path != key and any(f"{path}.{suffix}" in tensors for suffix in suffixes):
            copies[path.removeprefix(PREFIX)] = tensor
        elif not _is_written_twice(key, tensors):
            own[key] = tensor
    return own, copies


def _is_written_twice(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether `key` names a tensor inside PEFT's wrapper of a module that is in the file under its plain name too."""
    match = _PEFT_WRAPPER.match(key)
    if match is None:
        return False
    path, wrapper, inside = match.groups()
    plain = [f"{path}.{inside}"]
    if wrapper == "modules_to_save":  # the adapter's name may stand after it
        plain.append(f"{path}.{inside.partition('.')[2]}")
    return any(name in tensors for name in plain)


def compare(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], faults: Faults) -> None:
    """Add a fault for every tensor that is missing, misshapen, not finite, or that nothing takes."""
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
            continue  # its bytes are not looked at: there may be any number of them
        elif tensor.is_floating_point() and not fits(tensor, torch.float32):
            faults.add(f"values: {key} holds NaN or infinity")


def compare_kinds(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], faults: Faults) -> None:
    """Add a fault for every tensor of integers where floating-point numbers are expected, or the reverse."""
    for key, tensor in tensors.items():
        if key in expected and tensor.is_floating_point() != expected[key].is_floating_point():
            faults.add(f"kind: {key} holds {tensor.dtype} in the file, {expected[key].dtype} in the model")


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter's folder.

    Raises:
        AdapterFileError: a file is absent, truncated, or not what its name says; the message names it and what to do.
    """
    path = Path(folder)
    config = read_config(path)
    weights = path / WEIGHTS_NAME
    file = own_file(path, WEIGHTS_NAME)
    if file is None:
        if (path / LEGACY_WEIGHTS_NAME).is_file():
            raise AdapterFileError(
                f"{path} holds {LEGACY_WEIGHTS_NAME}, a pickle. Convert it once: hf-lora convert {path} --out FOLDER"
            )
        raise AdapterFileError(f"{path} holds {CONFIG_NAME} and no {WEIGHTS_NAME}: the adapter is incomplete.")
    _check_entries(read_header(file, weights))
    try:
        tensors = load_file(file)
    except (SafetensorError, ValueError, OSError, RuntimeError, MemoryError) as error:  # torch maps it
        raise AdapterFileError(f"{weights} is not a whole safetensors file ({error}). {REPAIR}") from error
    own, copies = split_base_copies(tensors)
    return AdapterFile(config, own, read_extras(path), path, read_json(path, CONFIG_NAME) or {}, copies)


def _check_entries(file: TensorFile) -> None:
    """Factors are matrices of floating-point numbers, and nothing is empty."""
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


def read_config(path: Path) -> LoraConfig:
    """The adapter_config.json of a folder."""
    file = path / CONFIG_NAME
    _finish(path)
    values = read_json(path, CONFIG_NAME)
    if values is None:
        inner = sorted(p.parent.name for p in path.glob(f"*/{CONFIG_NAME}")) if path.is_dir() else []
        also = f" It holds the adapters {', '.join(inner)} in folders of their own: name one." if inner else ""
        there = "is not an adapter's folder" if path.is_dir() else "does not exist"
        raise AdapterFileError(f"{path} {there} (no {CONFIG_NAME}).{also}")
    check_config(values, str(file))
    try:
        config = LoraConfig.from_dict(values, call=str(file))
    except ConfigError as error:
        raise AdapterFileError(str(error), error.faults) from error
    faults = Faults(str(file))
    check_names(config, faults)
    faults.check(AdapterFileError, "Import the package that registers these, or load the adapter with what wrote it.")
    return config


def _finish(path: Path) -> None:
    """Finish a save into this folder that was cut off between its files."""
    try:
        finish_moves(path)
    except OSError as error:
        raise AdapterFileError(
            f"{path} holds a save that was cut off, and cannot be written to finish it ({error}). Copy the folder to "
            "a place that can be written, and load that."
        ) from error


def read_extras(path: Path) -> dict[str, Any]:
    """The hf_lora.json of a folder, empty where another library wrote the adapter."""
    values = read_json(path, EXTRAS_NAME)
    if values is None:
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
    """Write an adapter's three files; they take their places together, when all are whole.

    Args:
        allow_nonfinite: write NaN and infinity too, to look at them later. Loading refuses such a file.

    Raises:
        AdapterFileError: a tensor is not finite or empty (a parameter that was not gathered), or no space is left.
            Files that were there are unchanged.
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
    faults.check(AdapterFileError, "Nothing was written; files that were there are unchanged.")
    path.mkdir(parents=True, exist_ok=True)
    ready = _unshared(ready)
    writers: dict[str, Callable[[Path], Any]] = {
        WEIGHTS_NAME: lambda file: save_file(ready, file, metadata={"format": "pt"}),
        EXTRAS_NAME: lambda file: file.write_text(_json(extras), encoding="utf-8"),
        CONFIG_NAME: lambda file: file.write_text(_json(config), encoding="utf-8"),
    }
    replace_together(path, writers)
    return path


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory; a shared one is written for each name."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return result


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

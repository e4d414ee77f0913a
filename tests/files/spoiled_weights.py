"""Named ways to spoil the safetensors file of an adapter, in its bytes, its header and its tensors."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_lora.files.format import LEGACY_WEIGHTS_NAME, WEIGHTS_NAME

REFUSED, LOADS, EITHER = "refused", "loads", "either"
MARK = "a_module_that_is_never_imported"


@dataclass(frozen=True)
class Mutation:
    change: Callable[[Path], Any]
    """Takes a copy of a seed; a false value of its own says that it does not apply to this seed."""
    ends: str = REFUSED


def text(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """Change the bytes of a file."""

    def rewrite(folder: Path) -> Any:
        if not (folder / name).is_file():
            return False
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return rewrite


Header = dict[str, Any]


def split(raw: bytes) -> tuple[Header, bytes]:
    """(header, bytes of the tensors) of a safetensors file."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(header: Header | bytes, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def header(change: Callable[[Header], Any]) -> Callable[[Path], Any]:
    """Change the header, and leave the bytes of the tensors."""

    def rewrite(raw: bytes) -> bytes:
        values, data = split(raw)
        return join(change(values) or values, data)

    return text(WEIGHTS_NAME, rewrite)


def first(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    """Change what the header says of the first tensor."""

    def rewrite(values: Header) -> Any:
        key = next(k for k in values if k != "__metadata__")
        replaced = change(values[key])
        if replaced is not None:
            values[key] = replaced

    return header(rewrite)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    """Change the tensors, in a file that is whole."""

    def rewrite(folder: Path) -> None:
        held = load_file(folder / WEIGHTS_NAME)
        held = {key: tensor.clone() for key, tensor in held.items()}
        held = change(held) or held
        save_file({key: tensor.contiguous() for key, tensor in held.items()}, folder / WEIGHTS_NAME)

    return rewrite


def _renamed(name: str) -> Callable[[Path], Any]:
    return header(lambda values: {name if i == 1 else key: value for i, (key, value) in enumerate(values.items())})


def _key(held: dict[str, torch.Tensor]) -> str:
    return next(key for key in held if "lora_A" in key)


def _filled(value: float, dtype: torch.dtype = torch.float32) -> Callable[[Path], Any]:
    def change(held: dict[str, torch.Tensor]) -> None:
        key = _key(held)
        held[key] = held[key].to(dtype)
        held[key].view(-1)[-1] = value

    return tensors(change)


def _cast(dtype: torch.dtype) -> Callable[[Path], Any]:
    return tensors(lambda held: {key: tensor.to(dtype) for key, tensor in held.items()})


def _rank(change: int) -> Callable[[Path], Any]:
    def rewrite(held: dict[str, torch.Tensor]) -> None:
        key = _key(held)
        held[key] = torch.ones(held[key].shape[0] + change, *held[key].shape[1:])

    return tensors(rewrite)


def sparse(folder: Path, size: int = 2**40, rows: int = 2**28, name: str = "") -> None:
    """A file of any size that takes no space on the disk, with a tensor as large."""
    values, data = split((folder / WEIGHTS_NAME).read_bytes())
    at = len(data)
    values[name or "base_model.model.x.lora_A.weight"] = {
        "dtype": "F32", "shape": [rows, size // rows // 4], "data_offsets": [at, at + size],
    }  # fmt: skip
    raw = join(values, data)
    with (folder / WEIGHTS_NAME).open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + size)


def _moved(by: int) -> Callable[[Any], None]:
    def change(entry: Any) -> None:
        entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]

    return change


def _entry(**values: Any) -> Callable[[Path], Any]:
    return first(lambda entry: entry | values)


def _many(count: int, size: int) -> Callable[[Path], Any]:
    """Many small tensors more."""

    def rewrite(raw: bytes) -> bytes:
        values, data = split(raw)
        at = len(data)
        for i in range(count):
            where = [at + i * size, at + (i + 1) * size]
            values[f"base_model.model.m{i}.lora_A.weight"] = {"dtype": "U8", "shape": [1, size], "data_offsets": where}
        return join(values, data + bytes(count * size))

    return text(WEIGHTS_NAME, rewrite)


def of_weights() -> dict[str, Mutation]:
    last_bytes = {f"cut to {n}": text(WEIGHTS_NAME, lambda raw, n=n: raw[:n]) for n in (0, 1, 7, 8, 9, 100, 1000)}
    lengths = {
        f"length {n}": text(WEIGHTS_NAME, lambda raw, n=n: struct.pack("<Q", n) + raw[8:])
        for n in (0, 1, 2, 2**31, 2**63, 2**64 - 1)
    }
    length_off = {
        f"length off by {n}": text(WEIGHTS_NAME, lambda raw, n=n: join_off(raw, n)) for n in (-8, -1, 1, 8)
    }  # fmt: skip
    bad_headers = {
        f"header {what}": text(WEIGHTS_NAME, lambda raw, new=new: join(new, split(raw)[1]))
        for what, new in {
            "empty": b"", "list": b"[]", "null": b"null", "open": b'{"a"', "binary": bytes(range(256)),
            "deep": b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "deep lists": b'{"a":' + b"[" * 200_000,
            "spaces": b" " * 5000, "half a character": b'{"\\ud800": 1}', "of numbers": b'{"a": 1}',
            "too large": b"{" + b" " * 2**21 + b"}", "NaN": b'{"a": NaN}', "without tensors": b"{}",
        }.items()
    }  # fmt: skip
    bad_entries = {
        "offsets past the end": first(lambda e: e | {"data_offsets": [0, 2**40], "shape": [2**38, 1]}),
        "offsets backwards": first(lambda e: e | {"data_offsets": e["data_offsets"][::-1]}),
        "offsets negative": first(_moved(-(10**6))),
        "offsets huge": first(_moved(2**63)),
        "offsets fractions": _entry(data_offsets=[0.0, 512.0]),
        "offsets texts": _entry(data_offsets=["0", "512"]),
        "offsets one": _entry(data_offsets=[0]),
        "offsets three": _entry(data_offsets=[0, 1, 2]),
        "offsets none": _entry(data_offsets=None),
        "overlap by 4": first(_moved(4)),
        "gap": header(lambda v: {k: e for i, (k, e) in enumerate(v.items()) if i != 1}),
        "shape too large": first(lambda e: e | {"shape": [n * 2 for n in e["shape"]]}),
        "shape that overflows": _entry(shape=[2**62, 2**62]),
        "shape that overflows to 0": _entry(shape=[2**32, 2**32]),
        "shape negative": first(lambda e: e | {"shape": [-n for n in e["shape"]]}),
        "shape fractions": first(lambda e: e | {"shape": [float(n) for n in e["shape"]]}),
        "shape true": _entry(shape=[True, True]),
        "shape a number": _entry(shape=4),
        "shape an object": _entry(shape={"0": 4}),
        "shape empty": _entry(shape=[]),
        "shape 0": _entry(shape=[0, 32]),
        "shape of 40 sizes": first(lambda e: e | {"shape": [1] * 40 + e["shape"]}),
        "shape flat": first(lambda e: e | {"shape": [(e["data_offsets"][1] - e["data_offsets"][0]) // 4]}),
        "shape turned": first(lambda e: e | {"shape": [*e["shape"][::-1]]} if e["shape"][0] != e["shape"][-1] else e),
        "dtype F8": _entry(dtype="F8_E4M3"),
        "dtype F4": _entry(dtype="F4"),
        "dtype C64": _entry(dtype="C64"),
        "dtype I32": _entry(dtype="I32"),
        "dtype U32": _entry(dtype="U32"),
        "dtype BOOL": _entry(dtype="BOOL"),
        "dtype F16 of the same bytes": _entry(dtype="F16"),
        "dtype unknown": _entry(dtype="os.system"),
        "dtype a number": _entry(dtype=5),
        "dtype none": _entry(dtype=None),
        "an entry without shape": first(lambda e: {k: v for k, v in e.items() if k != "shape"}),
        "an entry with more": _entry(module=MARK),
        "an entry a list": first(lambda e: [e]),
        "an entry null": header(lambda v: v | {"a": None}),
        "metadata a list": header(lambda v: v | {"__metadata__": [1]}),
        "metadata of numbers": header(lambda v: v | {"__metadata__": {"format": 1}}),
        "metadata deep": header(lambda v: v | {"__metadata__": {"format": {"a": {}}}}),
        "a name twice": text(WEIGHTS_NAME, _twice),
        "a name upwards": _renamed("../../base_model.model.x.lora_A.weight"),
        "a name absolute": _renamed("/etc/passwd"),
        "a name with a NUL": _renamed("base_model.model.x\0.lora_A.weight"),
        "a name with a newline": _renamed("base_model.model.x\n.lora_A.weight"),
        "a name with an escape": _renamed("\x1b[2J.lora_A.weight"),
        "a name that runs backwards": _renamed("base_model.model.\u202ex.lora_A.weight"),
        "a name of 5000": _renamed("x" * 5000),
        "a name empty": _renamed(""),
        "a name of dots": _renamed("." * 1000),
        "a name of digits": _renamed("base_model.model." + "9" * 900 + ".lora_A.weight"),
        "a name of a method": _renamed("base_model.model.__class__.lora_A.weight"),
        "a name without its prefix": header(lambda v: {k.removeprefix("base_model.model."): e for k, e in v.items()}),
    }  # fmt: skip
    bad_tensors = {
        "NaN": _filled(float("nan")),
        "infinity": _filled(float("inf")),
        "-infinity": _filled(float("-inf")),
        "NaN in 16 bits": _filled(float("nan"), torch.bfloat16),
        "too large for float32": _filled(1e300, torch.float64),
        "whole numbers": _cast(torch.int32),
        "truth values": _cast(torch.bool),
        "one more row": _rank(1),
        "one row less": _rank(-1),
        "2000 more rows": _rank(2000),
        "one tensor more": tensors(lambda t: t | {"base_model.model.lm_headd.lora_A.weight": torch.ones(4, 32)}),
        "one tensor less": tensors(lambda t: t.pop(_key(t)) is None),
        "no factors": tensors(lambda t: {"x": torch.ones(1)}),
        "a bias that nothing takes": tensors(
            lambda t: t | {_key(t).replace(".lora_A.weight", ".base_layer.bias"): torch.ones(32)}
        ),
        "whole numbers as a bias": tensors(
            lambda t: t | {_key(t).replace(".lora_A.weight", ".base_layer.bias"): torch.ones(32, dtype=torch.int64)}
        ),
        "a magnitude": tensors(
            lambda t: t | {_key(t).replace(".lora_A.weight", ".lora_magnitude_vector"): torch.ones(32)}
        ),
        "other base weights": tensors(
            lambda t: t | {_key(t).replace(".lora_A.weight", ".base_layer.weight"): torch.ones(32, 32)}
        ),
        "20000 tensors more": _many(20_000, 1),
        "2000 tensors more": _many(2000, 64),
        "a sparse file of 1 TB": sparse,
        "bytes at the end": text(WEIGHTS_NAME, lambda raw: raw + b"x"),
        "a page at the end": text(WEIGHTS_NAME, lambda raw: raw + bytes(4096)),
        "the last byte gone": text(WEIGHTS_NAME, lambda raw: raw[:-1]),
        "a zip": text(WEIGHTS_NAME, lambda raw: b"PK\3\4" + raw),
        "a pickle": text(WEIGHTS_NAME, lambda raw: pickle.dumps({"a": 1}) * 100),
        "not there": lambda folder: (folder / WEIGHTS_NAME).unlink(),
        "a pickle in its place": lambda folder: (folder / WEIGHTS_NAME).rename(folder / LEGACY_WEIGHTS_NAME),
    }
    good = {
        "in bfloat16": _cast(torch.bfloat16),
        "in float16": _cast(torch.float16),
        "in float64": _cast(torch.float64),
        "in another order": tensors(lambda t: dict(reversed(t.items()))),
        "a header with spaces": header(lambda v: json.dumps(v).encode() + b" " * 64),
        "metadata with code": header(lambda v: v | {"__metadata__": {"format": "pt", "code": "import os"}}),
    }
    refused = {**last_bytes, **lengths, **length_off, **bad_headers, **bad_entries, **bad_tensors}
    found = {f"weights: {what}": Mutation(change) for what, change in refused.items()}
    found |= {f"weights: {what}": Mutation(change, LOADS) for what, change in good.items()}
    # Square factors may be turned, and a first tensor that is a head may hold another dtype, unseen.
    found["weights: shape turned"] = Mutation(bad_entries["shape turned"], EITHER)
    return found


def join_off(raw: bytes, by: int) -> bytes:
    (length,) = struct.unpack("<Q", raw[:8])
    return struct.pack("<Q", length + by) + raw[8:]


def _twice(raw: bytes) -> bytes:
    values, data = split(raw)
    key = next(k for k in values if k != "__metadata__")
    once = json.dumps({key: values[key]}).encode()
    return join(once[:-1] + b", " + json.dumps(values).encode()[1:], data)

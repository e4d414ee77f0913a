"""The storages are the only files that know a backend, and a new one is an entry of their table."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_lora
from hf_lora import LoraConfig, MergeError, apply_lora
from hf_lora.layers.storages import STORAGES, DenseStorage, numel, quantization_of, storage_of, unshardable
from hf_lora.layers.storages.bnb import Bits4Storage

PACKAGE = Path(hf_lora.__file__).parent
STORAGES_FOLDER = PACKAGE / "layers" / "storages"
BACKENDS = re.compile(
    r"bitsandbytes|torchao|bnb|quant_state|Params4bit|Int8Params|Linear4bit|Linear8bit|llm_int8|\bSCB\b"
    r"|act_quant_kwargs|activation_quantization|support_avx512bf16|packing_format_for_cpu",
    re.IGNORECASE,
)
MESSAGES = {
    # What a person may write in their own call of from_pretrained, told to them in these words.
    ("train/engines.py", "DDP, or load it in 4 bits with bnb_4bit_quant_storage=torch.bfloat16."),
    (
        "train/engines.py",
        ": every process holds all of them. To shard them, load the base with bnb_4bit_quant_storage=torch.bfloat16 "
        "(the dtype of its other weights).",
    ),
    ("adapt/targets.py", "llm_int8_skip_modules or modules_to_not_convert: "),
    # Packages whose versions are printed.
    ("cli/env.py", "bitsandbytes"),
    ("cli/env.py", "torchao"),
    # Loggers that the commands silence.
    ("cli/quiet.py", "bitsandbytes"),
    ("cli/quiet.py", "torchao"),
}


def words(tree: ast.AST) -> Iterator[str]:
    """The names and strings of a file that do something: no comment and no docstring."""
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield value


def test_no_other_file_knows_a_backend() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if STORAGES_FOLDER not in path.parents]
    assert len(files) > 100
    found = {
        (path.relative_to(PACKAGE).as_posix(), word)
        for path in files
        for word in words(ast.parse(path.read_text(encoding="utf-8")))
        if BACKENDS.search(word)
    }
    unknown = {each for each in found if not any(each[0] == file and text in each[1] for file, text in MESSAGES)}
    assert not unknown, "ask hf_lora.layers.storages instead"
    for file, text in MESSAGES:
        assert any(file == where and text in word for where, word in found), "no longer said: take it off the list"


def test_the_scan_finds_what_it_looks_for() -> None:
    own = [word for path in STORAGES_FOLDER.glob("*.py") for word in words(ast.parse(path.read_text("utf-8")))]
    assert {"bitsandbytes", "torchao", "quant_state"} <= {word for word in own if BACKENDS.search(word)}


def test_no_file_imports_a_backend() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            absolute = isinstance(node, ast.ImportFrom) and not node.level
            names = [node.module or ""] if absolute else []  # type: ignore[attr-defined]
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.partition(".")[0] for name in names} & {"bitsandbytes", "torchao"}, path


class DoubledStorage(DenseStorage):
    """A backend of the user's: it reads a dense weight as twice what stands there."""

    kind = "doubled"

    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        return super().read(layer, rows, into).mul_(2)


def test_a_storage_that_a_user_adds_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(3, 2)
    assert storage_of(layer) is STORAGES["dense"]
    monkeypatch.setitem(STORAGES, "doubled", DoubledStorage())
    assert storage_of(layer) is STORAGES["doubled"]
    assert quantization_of(layer) is None
    model: Any = apply_lora(nn.Sequential(nn.Linear(3, 2)), LoraConfig(r=1, target_modules=["0"]))
    assert model[0]._lora.storage is STORAGES["doubled"]


def test_what_was_kept_restores_every_bit() -> None:
    layer, storage = nn.Linear(3, 2, dtype=torch.bfloat16), STORAGES["dense"]
    before, parameter = layer.weight.detach().clone(), layer.weight
    kept = storage.keep(layer)
    storage.write(layer, slice(0, 1), torch.ones(1, 3, dtype=torch.float64))
    assert not torch.equal(layer.weight, before)
    assert torch.equal(kept, before)
    storage.put_back(layer, kept)
    assert torch.equal(layer.weight, before)
    assert layer.weight is parameter


def test_a_quantized_weight_is_not_kept_since_it_is_never_written() -> None:
    with pytest.raises(MergeError, match="never written"):
        Bits4Storage().keep(nn.Linear(3, 2))


def test_an_ordinary_parameter_is_no_backends() -> None:
    layer = nn.Linear(3, 2)
    assert numel(layer.weight) is None
    assert unshardable(layer) == []
    assert storage_of(layer).refuse(layer) is None  # type: ignore[union-attr]

"""A saved adapter, and what spoils its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors, randomize, snapshot, tiny_llama
from safetensors.torch import load_file, save_file

from hf_lora import AdapterFileError, LoraConfig, LoraError, LoraModel, apply_lora
from hf_lora.files.format import CONFIG_NAME, WEIGHTS_NAME

PREFIX = "base_model.model.model.layers"
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good adapter of the tiny Llama."""
    folder = tmp_path_factory.mktemp("good")
    randomize(apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=TARGETS))).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def spoil_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def spoil_json(folder: Path, name: str = CONFIG_NAME, **values: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(folder: Path, error: type[LoraError] = AdapterFileError, **kwargs: Any) -> str:
    """The message with which the folder is refused; the base is unchanged afterwards."""
    base = tiny_llama()
    before, kind = snapshot(base), type(base)
    with pytest.raises(error) as caught:
        LoraModel.from_pretrained(folder, base_model=base, **kwargs)
    assert type(base) is kind
    assert_same_tensors(snapshot(base), before)
    assert all(p.requires_grad for p in base.parameters())
    return str(caught.value)

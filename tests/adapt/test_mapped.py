"""Merging weights that are still a map of their file: the same bits, and the file as it was."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors, randomize, snapshot, tiny_llama

from hf_lora import LoraConfig, LoraModel, apply_lora
from hf_lora.layers.file_maps import lies_in, release_pages, unwritten_maps

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps are read from Linux' /proc")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tiny_llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    randomize(apply_lora(base, LoraConfig(r=4))).save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    return tmp_path


def load(folder: Path, **options: Any) -> Any:
    return LoraModel.from_pretrained(folder / "adapter", base_model=str(folder / "base"), **options)


def in_memory(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def test_a_mapped_base_is_merged_to_the_same_bits_and_its_file_is_untouched(folder: Path) -> None:
    file = folder / "base" / "model.safetensors"
    before = hashlib.sha256(file.read_bytes()).digest()
    expected = snapshot(in_memory(load(folder)).merge_and_unload())
    model = load(folder)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert lies_in(weight, unwritten_maps())  # else this test shows nothing
    parameters = {n: id(p) for n, p in model.named_parameters() if "lora_" not in n}
    merged = model.merge_and_unload()
    assert_same_tensors(snapshot(merged), expected)
    assert {n: id(p) for n, p in merged.named_parameters()} == parameters
    assert not lies_in(weight, unwritten_maps())
    assert hashlib.sha256(file.read_bytes()).digest() == before


def test_a_mapped_base_comes_back_bit_for_bit(folder: Path) -> None:
    model = load(folder)
    assert lies_in(model.model.layers[1].self_attn.q_proj.weight, unwritten_maps())
    before = snapshot(model)
    model.merge_adapter()
    changed = snapshot(model)
    assert any(not torch.equal(changed[n], t) for n, t in before.items())
    model.unmerge_adapter()
    assert_same_tensors(snapshot(model), before)


def test_what_was_written_to_is_no_longer_given_back(folder: Path) -> None:
    model = load(folder)
    weight = model.model.layers[0].mlp.up_proj.weight.data
    alias, before = weight.view(-1), weight.clone()
    release_pages(weight)
    assert torch.equal(weight, before)  # read from the file again
    alias[0] = 3.0
    assert not lies_in(weight, unwritten_maps())  # its pages are this process's own now
    assert not lies_in(torch.randn(9), unwritten_maps())
    assert not lies_in(before.t(), [(0, 2**63)])

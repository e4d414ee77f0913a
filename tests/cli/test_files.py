"""merge, convert and inspect against the library's own functions and float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_near, token_ids
from helpers import run_command as run
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lora import LoraModel, inspect_adapter
from hf_lora.files.inspect import singular_values


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_merge_gives_a_full_model_that_answers_alike(adapter_folder: str, tmp_path: Path, dtype: str | None) -> None:
    out = tmp_path / "merged"
    run("merge", adapter_folder, "--out", out, *(["--dtype", dtype] if dtype else []))
    merged, report = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not (out / "adapter_config.json").exists()
    assert merged.dtype == (torch.bfloat16 if dtype else torch.float32)
    adapted = LoraModel.from_pretrained(adapter_folder)
    if dtype is None:
        assert_near(merged.eval()(token_ids()).logits, adapted(token_ids()).logits, torch.float32, 64)
    else:  # one rounding of what float32 gives
        whole = LoraModel.from_pretrained(adapter_folder, merge=True).state_dict()
        assert all(torch.equal(v, whole[k].to(v.dtype)) for k, v in merged.state_dict().items())
    assert AutoTokenizer.from_pretrained(out)("open the door")["input_ids"]


def test_merge_writes_into_no_folder_that_holds_something(adapter_folder: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty" in run("merge", adapter_folder, "--out", tmp_path, code=2).stderr
    run("merge", adapter_folder, "--out", tmp_path, "--overwrite")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "holds an adapter" in run("merge", adapter_folder, "--out", adapter_folder, "--overwrite", code=2).stderr
    assert "'float32'" in run("merge", adapter_folder, "--out", tmp_path / "x", "--dtype", "float23", code=2).stderr


def test_convert_keeps_every_bit(adapter_folder: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    tensors = load_file(Path(adapter_folder, "adapter_model.safetensors"))
    torch.save(tensors, old / "adapter_model.bin")
    (old / "adapter_config.json").write_bytes(Path(adapter_folder, "adapter_config.json").read_bytes())
    assert f"{len(tensors)} tensors" in run("convert", old, "--out", new).output
    found = load_file(new / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], t) for k, t in tensors.items())
    assert "holds an adapter" in run("convert", old, "--out", old, "--overwrite", code=2).stderr
    torch.save({"a": Exception("not a tensor")}, old / "adapter_model.bin")
    assert "only tensors" in run("convert", old, "--out", tmp_path / "third", code=2).stderr


def test_inspect_gives_norms_without_forming_the_update(adapter_folder: str) -> None:
    summary = inspect_adapter(adapter_folder)
    tensors = load_file(Path(adapter_folder, "adapter_model.safetensors"))
    config = json.loads(Path(adapter_folder, "adapter_config.json").read_text())
    assert {s.path for s in summary.layers} == {k.split(".lora_")[0][17:] for k in tensors if ".lora_" in k}
    for layer in summary.layers:
        a, b = (tensors[f"base_model.model.{layer.path}.lora_{x}.weight"].double() for x in "AB")
        alpha = 2.0 if layer.path.endswith("query") else config["lora_alpha"]
        update = alpha / 4 * (b @ a)
        assert (layer.r, layer.alpha, layer.features) == (4, alpha, tuple(reversed(update.shape)))
        assert layer.norm == pytest.approx(float(update.norm()), rel=1e-12)
        assert layer.stable_rank == pytest.approx(float(update.norm() ** 2 / torch.linalg.matrix_norm(update, 2) ** 2))
        assert layer.parameters == a.numel() + b.numel()
    assert summary.parameters == sum(t.numel() for t in tensors.values())
    assert summary.bytes == Path(adapter_folder, "adapter_model.safetensors").stat().st_size
    assert set(summary.whole) == {"classifier.weight", "classifier.bias"}


def test_singular_values_of_convolutions_with_groups() -> None:
    a, b = torch.randn(6, 8, 3, 3), torch.randn(12, 3, 1, 1)  # 2 groups, as PEFT stores them
    blocks = [bb.flatten(1) @ aa.flatten(1) for aa, bb in zip(a.double().chunk(2), b.double().chunk(2), strict=True)]
    assert float(singular_values(a, b).norm()) == pytest.approx(float(torch.cat(blocks).norm()), rel=1e-12)
    assert float(singular_values(a, torch.zeros_like(b)).norm()) == 0


def test_inspect_prints_and_draws(adapter_folder: str, tmp_path: Path) -> None:
    picture = tmp_path / "norms.png"
    output = run("inspect", adapter_folder, "--plot", picture).output
    assert "encoder.layer.0.attention.self.query" in output
    assert "kept whole:" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    assert "could not be written" in run("inspect", adapter_folder, "--plot", tmp_path / "norms.doc", code=2).stderr

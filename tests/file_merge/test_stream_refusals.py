"""What merging from file to file refuses, before it writes anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from file_merge.merges import refused, save_adapter, save_base, tensors_of
from helpers import tiny_bert, tiny_llama
from safetensors.torch import load_file, save_file

from hf_lora import AdapterFileError, BaseMismatchError, ConfigError, MergeError, merge_files


def test_every_fault_of_the_files_is_in_one_error(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path, "20KB")
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM")
    first, second, third = sorted(base.glob("*.safetensors"))[:3]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-8])
    third.write_bytes((1 << 40).to_bytes(8, "little") + third.read_bytes()[8:])
    (adapter / "adapter_config.json").write_text("{")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    said = refused(AdapterFileError, base, adapter, tmp_path / "out")
    torn = (f"{second} is not a complete safetensors file", f"{third} is not a complete safetensors file")
    for part in (f"{first} is missing", *torn, "is not valid JSON", "is not empty"):
        assert part in said


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ('"shape":[32]', '"shape":[-4,-8]'),
        ('"shape":[32]', '"shape":[32.0]'),
        ('"dtype":"F32"', '"dtype":"F32","dtype":"F32"'),
        ('"dtype":"F32"', '"dtype":"Q4"'),
    ],
)
def test_a_header_that_is_not_what_the_format_says(tmp_path: Path, written: str, instead: str) -> None:
    base = save_base(tiny_llama(), tmp_path)
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM")
    file = base / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode()
    assert written in header
    changed = header.replace(written, instead, 1).encode()
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
    said = refused(AdapterFileError, base, adapter, tmp_path / "out")
    assert f"{file} is not a complete safetensors file" in said


def test_folders_that_cannot_be_written_to(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path)
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM")
    assert "the folder of the base" in refused(AdapterFileError, base, adapter, base)
    assert "the folder of the adapter" in refused(AdapterFileError, base, adapter, adapter, overwrite=True)
    assert "is a file" in refused(AdapterFileError, base, adapter, base / "config.json")
    assert "is an adapter. Merge it first" in refused(AdapterFileError, adapter, adapter, tmp_path / "out")
    assert "'float32'" in refused(ConfigError, base, adapter, tmp_path / "out", dtype="float23")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert "is quantized" in refused(AdapterFileError, base, adapter, tmp_path / "out")


def test_an_adapter_that_does_not_fit(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path)
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM")
    weights = adapter / "adapter_model.safetensors"
    whole = load_file(weights)
    names = sorted(whole)
    broken = {n: t for n, t in whole.items() if n != names[0]}
    broken[names[1]] = whole[names[1]][:, :-1].contiguous()
    broken[names[2]] = torch.full_like(whole[names[2]], torch.nan)
    save_file(broken, weights)
    said = refused(AdapterFileError, base, adapter, tmp_path / "out")
    for part in (f"missing: {names[0]}", f"shape: {names[1]}", f"values: {names[2]}"):
        assert part in said
    save_file(whole, weights)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_qalora": True}))
    assert "qa-lora" in refused(AdapterFileError, base, adapter, tmp_path / "out").lower()


def test_another_base_is_refused_by_its_values(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path)
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM")
    other = save_base(tiny_llama(seed=9), tmp_path / "other")
    assert "is another base model" in refused(BaseMismatchError, other, adapter, tmp_path / "out")
    merge_files(other, adapter, tmp_path / "out", allow_other_base=True)
    half = save_base(tiny_llama().to(torch.bfloat16), tmp_path / "half")  # the same values: no other base
    merge_files(half, adapter, tmp_path / "half" / "out")


def test_parameters_that_nobody_holds(tmp_path: Path) -> None:
    base = save_base(tiny_bert(), tmp_path)
    adapter = save_adapter(base, tmp_path, task_type="SEQ_CLS")
    tensors = tensors_of(base)
    del tensors["bert.pooler.dense.weight"]
    tensors["bert.embeddings.LayerNorm.bias"] = torch.zeros(7)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    said = refused(MergeError, base, adapter, tmp_path / "out", allow_other_base=True)
    assert "missing: bert.pooler.dense.weight" in said
    assert "shape: bert.embeddings.LayerNorm.bias is [7]" in said


def test_an_overflow_is_found_before_anything_is_written(tmp_path: Path) -> None:
    base = save_base(tiny_llama().half(), tmp_path)
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM")
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({n: t * 1e6 if "lora_B" in n else t for n, t in tensors.items()}, weights)
    assert "too large for torch.float16" in refused(MergeError, base, adapter, tmp_path / "out")


def test_space_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    base = save_base(tiny_llama(), tmp_path)
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM")
    total, used, _ = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: type("Usage", (), {"total": total, "used": used, "free": 9})()
    )
    assert "are free in" in refused(AdapterFileError, base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()

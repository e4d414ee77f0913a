"""Bases and adapters in folders, merged from file to file and in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize, token_ids
from safetensors.torch import load_file
from torch import Tensor

from hf_lora import LoraConfig, LoraError, LoraModel, apply_lora, merge_files
from hf_lora.errors import Faults
from hf_lora.file_merge.ranges import open_checkpoint


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def layout(folder: Path) -> dict[str, list[str]]:
    return {s.path.name: [e.name for e in s.entries] for s in open_checkpoint(folder, Faults("test")).shards}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [n for n in one if one[n].dtype != other[n].dtype] == []
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


def save_base(model: Any, folder: Path, shard: str = "10GB") -> Path:
    model.save_pretrained(folder / "base", max_shard_size=shard)
    return folder / "base"


def save_adapter(base: Path, folder: Path, cls: Any = None, name: str = "adapter", **config: Any) -> Path:
    """An adapter with random values, trained on what lies in `base`."""
    import transformers

    held = json.loads((base / "config.json").read_text())
    cls = cls or getattr(transformers, held["architectures"][0])
    model = cls.from_pretrained(base, **({"num_labels": config.pop("labels")} if "labels" in config else {}))
    apply_lora(model, LoraConfig(**{"r": 4, "target_modules": "all-linear"} | config))
    randomize(model)
    model.save_pretrained(folder / name)
    return folder / name


def merged_in_memory(base: Path, adapter: Path, folder: Path, untie: bool = False) -> Any:
    model = LoraModel.from_pretrained(adapter, base_model=str(base)).merge_and_unload(untie=untie)
    model.save_pretrained(folder / "memory")
    return model


@torch.no_grad()
def assert_merges_alike(base: Path, adapter: Path, folder: Path, **options: Any) -> Path:
    """The same names, dtypes and bits as in memory, and a plain reload with the same logits."""
    whole = merged_in_memory(base, adapter, folder, options.get("untie", False))
    out = merge_files(base, adapter, folder / "out", **options)
    assert_same_bits(tensors_of(out), tensors_of(folder / "memory"))
    again, report = type(whole).from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(again.eval()(token_ids())[0], whole.eval()(token_ids())[0])
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]
    return out


def refused(error: type[LoraError], base: Path, adapter: Path, out: Path, **options: Any) -> str:
    with pytest.raises(error) as caught:
        merge_files(base, adapter, out, **options)
    assert not [p for p in out.rglob("*") if p.suffix in (".safetensors", ".part")] or out in (base, adapter)
    return str(caught.value)

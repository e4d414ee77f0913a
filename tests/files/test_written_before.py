"""Adapters that an earlier state of the code wrote load, give what they gave, and are written the same again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from old_adapters import CASES, logits
from safetensors.torch import load_file

from hf_lora import LoraModel, apply_lora
from hf_lora.files.inspect import inspect_adapter

DATA = Path(__file__).parents[1] / "data" / "written_by_0.1.0"
EXPECTED: dict[str, list[float]] = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))


def loaded(name: str) -> Any:
    make, _ = CASES[name]
    return LoraModel.from_pretrained(DATA / name, base_model=make()).eval()


@pytest.mark.parametrize("name", CASES)
def test_an_old_adapter_gives_what_it_gave_and_is_written_the_same(name: str, tmp_path: Path) -> None:
    expected = torch.tensor(EXPECTED[name])
    allowed = 256 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    model = loaded(name)
    found = logits(model)
    make, config = CASES[name]
    assert (found - logits(make())).abs().max() > 100 * allowed, "the adapter must act, or this says nothing"
    assert (found - expected).abs().max() <= allowed
    model.save_pretrained(tmp_path)
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (DATA / name, tmp_path))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    before, after = (json.loads((f / "adapter_config.json").read_text("utf-8")) for f in (DATA / name, tmp_path))
    assert before == after
    assert inspect_adapter(DATA / name).parameters == sum(t.numel() for t in old.values())
    merged = model.merge_and_unload(untie=name == "gpt2")
    assert (logits(merged) - expected).abs().max() <= 4 * allowed
    again = apply_lora(make(), {"r": 3, "lora_alpha": 5, **config})
    again.load_adapter_weights(DATA / name)
    assert torch.equal(logits(again.eval()), found)

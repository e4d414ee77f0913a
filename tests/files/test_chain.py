"""An adapter whose base is an adapter: the chain is loaded from its base on, each merged before the next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import assert_near, tiny_llama, token_ids
from torch import Tensor

from hf_lora import AdapterFileError, LoraModel, merge_files, merge_to_folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """Three adapters of PEFT, each trained on the one before, and the logits of the last."""
    folder = tmp_path_factory.mktemp("chain")
    tiny_llama().save_pretrained(folder / "base")
    model: Any = type(tiny_llama()).from_pretrained(folder / "base")
    before = "base"
    for seed, name in enumerate(("first", "second", "third")):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"][: seed + 1], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        adapted = peft.get_peft_model(model, config).eval()
        adapted.save_pretrained(folder / name)
        names_base(folder / name, folder / before)
        with torch.no_grad():
            logits = adapted(token_ids()).logits
        model, before = adapted.merge_and_unload(), name
    return folder, logits


def names_base(adapter: Path, base: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))


@torch.no_grad()
def test_a_chain_is_loaded_from_its_base_on(chain: tuple[Path, Tensor], told: list[str], tmp_path: Path) -> None:
    folder, expected = chain
    loaded = LoraModel.from_pretrained(folder / "third")
    assert_near(loaded(token_ids()).logits, expected, torch.float32, 64)
    assert any(f"{folder / 'second'} -> {folder / 'first'}" in text for text in told)
    given = LoraModel.from_pretrained(folder / "third", base_model=folder / "second", merge=True)
    assert_near(given(token_ids()).logits, expected, torch.float32, 64)
    merge_to_folder(folder / "third", tmp_path / "whole")
    whole = type(given).from_pretrained(tmp_path / "whole")
    assert_near(whole(token_ids()).logits, expected, torch.float32, 64)


def test_merging_files_names_the_steps(chain: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, expected = chain
    with pytest.raises(AdapterFileError, match=r"second is an adapter. Merge it first \(hf-lora merge .*second --out"):
        merge_files(folder / "second", folder / "third", tmp_path / "out")
    base = merge_to_folder(folder / "second", tmp_path / "merged")
    out = merge_files(base, folder / "third", tmp_path / "out")
    assert_near(type(tiny_llama()).from_pretrained(out)(token_ids()).logits, expected, torch.float32, 64)


def test_a_chain_without_end_and_one_of_another_class(chain: tuple[Path, Tensor], tmp_path: Path) -> None:
    import shutil

    folder, _ = chain
    for name in ("first", "second", "third"):
        shutil.copytree(folder / name, tmp_path / name)
    names_base(tmp_path / "first", tmp_path / "second")
    names_base(tmp_path / "second", tmp_path / "first")
    names_base(tmp_path / "third", tmp_path / "second")
    with pytest.raises(AdapterFileError, match="and so on without end"):
        LoraModel.from_pretrained(tmp_path / "third")
    names_base(tmp_path / "first", folder / "base")
    path = tmp_path / "second" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "FEATURE_EXTRACTION"}))
    config = json.loads((tmp_path / "third/adapter_config.json").read_text())
    mapped = {"base_model_class": "LlamaForSequenceClassification", "parent_library": "transformers"}
    changed = config | {"task_type": None, "auto_mapping": mapped}
    (tmp_path / "third/adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(AdapterFileError, match=r"for a LlamaForSequenceClassification.*hf-lora merge .*second --out"):
        LoraModel.from_pretrained(tmp_path / "third")

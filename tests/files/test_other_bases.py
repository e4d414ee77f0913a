"""An adapter over another base than that of its training."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from files.conftest import spoil_json
from helpers import assert_same_tensors, snapshot, tiny_bert, tiny_llama

from hf_lora import AdapterFileError, BaseMismatchError, LoraConfig, LoraModel, apply_lora
from hf_lora.files.format import EXTRAS_NAME


def test_another_base_of_the_same_shape(saved: Path) -> None:
    other = tiny_llama(seed=1)
    before = snapshot(other)
    with pytest.raises(BaseMismatchError, match=r"another base model: its weights differ(.|\n)*allow_other_base=True"):
        LoraModel.from_pretrained(saved, base_model=other)
    assert_same_tensors(snapshot(other), before)
    assert isinstance(LoraModel.from_pretrained(saved, base_model=other, allow_other_base=True), LoraModel)
    model = apply_lora(tiny_llama(seed=1), LoraConfig(r=2), adapter_name="first")
    with pytest.raises(BaseMismatchError):
        model.load_adapter(saved, "second")
    model.load_adapter(saved, "second", allow_other_base=True)


def test_a_base_of_another_architecture(saved: Path) -> None:
    with pytest.raises(BaseMismatchError, match="trained on a llama model, this is a bert model"):
        LoraModel.from_pretrained(saved, base_model=tiny_bert())


def test_two_checkpoints_on_disk_that_differ(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for seed in (0, 1):
        tiny_llama(seed=seed).save_pretrained(tmp_path / f"base{seed}")
    model = apply_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base0"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(BaseMismatchError, match="files and its weights differ"):
        LoraModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "base1")
    shutil.copytree(tmp_path / "base0", tmp_path / "moved")
    LoraModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "moved")


def bf16(model: Any) -> Any:
    return model.to(torch.bfloat16)


def resized(model: Any) -> Any:
    model.resize_token_embeddings(70, mean_resizing=False)
    return model


def test_the_same_base_in_another_dtype_size_or_with_another_head(tmp_path: Path) -> None:
    """What is not part of a base's identity: dtype, vocabulary, head, label count, dropout, cache."""
    from transformers import AutoModelForSequenceClassification, BertForTokenClassification

    tiny_bert().save_pretrained(tmp_path / "base")
    load = AutoModelForSequenceClassification.from_pretrained
    model = apply_lora(
        load(tmp_path / "base"), LoraConfig(target_modules=["query", "output.dense"], modules_to_save=[])
    )
    model.save_pretrained(tmp_path / "adapter")
    spoil_json(tmp_path / "adapter", EXTRAS_NAME, base={"weights": read_base(tmp_path / "adapter")["weights"]})
    for base in (
        bf16(load(tmp_path / "base")),
        load(tmp_path / "base", dtype=torch.bfloat16),
        load(tmp_path / "base", dtype=torch.float16).float(),
        resized(load(tmp_path / "base")),
        load(tmp_path / "base", hidden_dropout_prob=0.5),
        load(tmp_path / "base", num_labels=7, ignore_mismatched_sizes=True),
        BertForTokenClassification.from_pretrained(tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True),
        copy.deepcopy(load(tmp_path / "base")),
    ):
        LoraModel.from_pretrained(tmp_path / "adapter", base_model=base)
    changed = load(tmp_path / "base")
    with torch.no_grad():
        for layer in changed.bert.encoder.layer:
            layer.attention.self.query.weight.mul_(1.1)
    with pytest.raises(BaseMismatchError, match="another base model"):
        LoraModel.from_pretrained(tmp_path / "adapter", base_model=changed)


def read_base(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / EXTRAS_NAME).read_text())["base"]
    return values


def test_a_copy_of_the_base_in_a_foreign_file_is_compared(tmp_path: Path) -> None:
    """PEFT writes the base's embedding beside an adapted one: it tells one base from another."""
    import peft

    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    model.save_pretrained(tmp_path)
    LoraModel.from_pretrained(tmp_path, base_model=tiny_llama())
    LoraModel.from_pretrained(tmp_path, base_model=tiny_llama().to(torch.bfloat16))
    with pytest.raises(BaseMismatchError, match=r"embed_tokens\.weight: its values in the file's base differ"):
        LoraModel.from_pretrained(tmp_path, base_model=tiny_llama(seed=1))
    LoraModel.from_pretrained(tmp_path, base_model=tiny_llama(seed=1), allow_other_base=True)


def test_a_base_without_a_name_may_be_an_empty_one(folder: Path) -> None:
    """So PEFT writes it with older transformers, for a model that never had files."""
    spoil_json(folder, base_model_name_or_path="")
    LoraModel.from_pretrained(folder, base_model=tiny_llama())
    with pytest.raises(AdapterFileError, match="base_model="):
        LoraModel.from_pretrained(folder)

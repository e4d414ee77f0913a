"""Saves that are refused, or that fail in the middle, leave the files of before."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors, randomize, tiny_bert, tiny_llama, tiny_t5
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file

import hf_lora.files.format as file_format
from hf_lora import AdapterFileError, ConfigError, LoraConfig, LoraModel, StateError, apply_lora
from hf_lora.files.format import CONFIG_NAME, EXTRAS_NAME, WEIGHTS_NAME


def test_saving_through_an_inner_model_is_refused(tmp_path: Path) -> None:
    model = apply_lora(tiny_llama())
    with pytest.raises(StateError, match="part of a LlamaForCausalLM"):
        model.base_model.save_pretrained(tmp_path / "x")
    t5 = apply_lora(tiny_t5())
    with pytest.raises(StateError, match="part of a T5ForConditionalGeneration"):
        t5.encoder.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    inner = tiny_llama()
    apply_lora(inner.model)
    inner.model.save_pretrained(tmp_path / "x")


def test_saving_while_merged_is_refused(tmp_path: Path) -> None:
    model = apply_lora(tiny_llama())
    model.merge_adapter()
    with pytest.raises(StateError, match=r"unmerge_adapter\(\)"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_saving_nan_lists_the_tensors_and_leaves_the_old_files(folder: Path) -> None:
    model = LoraModel.from_pretrained(folder, base_model=tiny_llama())
    before = contents(folder)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_A["default"].weight[0, 0] = float("nan")
        model.model.layers[1].mlp.down_proj.lora_B["default"].weight[0, 0] = float("inf")
    with pytest.raises(AdapterFileError) as caught:
        model.save_pretrained(folder)
    message = str(caught.value)
    assert "layers.0.self_attn.q_proj.lora_A.weight holds NaN" in message
    assert "layers.1.mlp.down_proj.lora_B.weight holds NaN" in message
    assert contents(folder) == before


def test_an_ungathered_tensor_is_not_saved(folder: Path) -> None:
    model = LoraModel.from_pretrained(folder, base_model=tiny_llama())
    before = contents(folder)
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    with pytest.raises(AdapterFileError, match="is empty here"):
        model.save_pretrained(folder, state_dict={name: torch.empty(0)})
    assert contents(folder) == before


@pytest.mark.parametrize(
    "step", ["in the weights", "in the second file", "before the third is on disk", "at the move"]
)
def test_a_crash_in_the_middle_of_a_save(folder: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """The old adapter stays whole, also where the new one has other layers, whose files would not fit the old ones."""
    model = randomize(apply_lora(tiny_llama(), LoraConfig(r=2, target_modules=["v_proj"])))
    before = contents(folder)
    calls = []

    def failing(*_: Any, **__: Any) -> Any:
        calls.append(step)
        raise OSError("no space left")

    def failing_third(file: int, sync: Any = os.fsync) -> None:
        return failing() if len(calls) == 2 else calls.append(step) or sync(file)

    if step == "in the weights":
        monkeypatch.setattr(
            file_format, "save_file", lambda _, file, **__: (Path(file).write_bytes(b"half"), failing())
        )
    elif step == "in the second file":
        monkeypatch.setattr(Path, "write_text", failing)
    elif step == "at the move":
        monkeypatch.setattr(Path, "replace", failing)
    else:
        monkeypatch.setattr(os, "fsync", failing_third)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(folder)
    monkeypatch.undo()
    assert calls
    assert contents(folder) == before
    LoraModel.from_pretrained(folder, base_model=tiny_llama())


def test_saved_files_are_as_readable_as_any_other(folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    model = LoraModel.from_pretrained(folder, base_model=tiny_llama())
    model.save_pretrained(tmp_path / "new")
    modes = {p.stat().st_mode for p in (tmp_path / "new").iterdir()}
    assert modes == {plain.stat().st_mode}
    assert {p.name for p in (tmp_path / "new").iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, EXTRAS_NAME}


def test_an_adapter_beside_a_full_model_is_warned_of(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"config\.json"):
        apply_lora(tiny_llama()).save_pretrained(tmp_path)


def test_a_wrong_adapter_name() -> None:
    for name in ("a.b", "", "a b", "keys", 3):
        with pytest.raises(ConfigError):
            apply_lora(tiny_llama(), adapter_name=name)  # type: ignore[arg-type]


def test_gathered_tensors_are_written_in_place_of_the_models_own(saved: Path, tmp_path: Path) -> None:
    """As a sharded run hands them over: by the names of the model's own state dict."""
    model = LoraModel.from_pretrained(saved, base_model=tiny_llama())
    model.save_pretrained(tmp_path, state_dict={k: v * 2 for k, v in model.state_dict().items()})
    found, before = load_file(tmp_path / WEIGHTS_NAME), load_file(saved / WEIGHTS_NAME)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[k], before[k] * 2) for k in before)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    apply_lora(tiny_llama()).save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


def test_labels_that_json_cannot_hold_are_saved_as_texts(tmp_path: Path) -> None:
    """A table gives NaN where a row has no label. What is saved is read again, whatever the labels are."""
    model = tiny_bert()
    try:
        model.config.id2label = {0: float("nan"), 1: "half \ud800", 2: ["a", "list"]}
    except StrictDataclassFieldValidationError:
        pytest.skip("this transformers lets no such labels into a config")
    randomize(apply_lora(model)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "hf_lora.json").read_text(encoding="utf-8"))["id2label"]
    assert saved == {"0": "nan", "1": "half ?", "2": "['a', 'list']"}
    again = LoraModel.from_pretrained(tmp_path, base_model=tiny_bert())
    assert again.config.id2label == {0: "nan", 1: "half ?", 2: "['a', 'list']"}


def test_an_adapter_that_moves_to_a_subfolder_leaves_no_older_one_behind(tmp_path: Path, messages: list[str]) -> None:
    model = randomize(apply_lora(tiny_llama(), LoraConfig(r=4), "first"))
    model.save_pretrained(tmp_path)
    model.add_adapter("second", LoraConfig(r=2))
    randomize(model, seed=5)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    for name in ("first", "second"):
        again = LoraModel.from_pretrained(tmp_path / name, base_model=tiny_llama())
        assert_same_tensors(again.get_adapter_state_dict(), model.get_adapter_state_dict(name))
    messages.clear()
    apply_lora(tiny_llama(), LoraConfig(r=8)).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert "has an adapter of an earlier save beside first, second" in messages[-1]  # which is no earlier one of these

"""Loud failures: each fault of a file is an error that lists them all, and nothing was changed before it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch_of
from files.conftest import PREFIX, TARGETS, refused, spoil_json, spoil_tensors
from helpers import assert_same_tensors, randomize, snapshot, tiny_llama
from safetensors.torch import load_file, save_file

from hf_lora import AdapterFileError, LoraConfig, LoraModel, StateError, TargetError, apply_lora, convert_adapter
from hf_lora.files.format import CONFIG_NAME, EXTRAS_NAME, LEGACY_WEIGHTS_NAME, WEIGHTS_NAME, read_adapter

# Targets -------------------------------------------------------------------------------------------------------------


def test_typos_among_several_targets_are_all_named_with_the_nearest_names() -> None:
    model = tiny_llama()
    before = snapshot(model)
    config = LoraConfig(
        target_modules=["q_proj", "v_prj", "o_prjo"], exclude_modules=["k_projj"], modules_to_save=["lm_hed"],
        rank_pattern={"up_proj": 3}, alpha_pattern={"qproj": 3},
    )  # fmt: skip
    with pytest.raises(TargetError) as caught:
        apply_lora(model, config)
    message = str(caught.value)
    for fault in ("v_prj", "o_prjo", "k_projj", "lm_hed", "up_proj", "qproj"):
        assert f"'{fault}'" in message
    assert "'v_proj'" in message
    assert "'lm_head'" in message
    assert "explain_targets" in message
    assert not isinstance(model, LoraModel)
    assert_same_tensors(snapshot(model), before)


def test_applying_twice_names_unload() -> None:
    model = apply_lora(tiny_llama())
    before = snapshot(model)
    with pytest.raises(StateError, match=r"already has an adapter 'default'.*unload\(\)"):
        apply_lora(model)
    assert_same_tensors(snapshot(model), before)
    with pytest.raises(StateError, match="'default'"):
        model.add_adapter("default", LoraConfig())


def test_loading_under_a_name_that_is_taken(folder: Path) -> None:
    model = LoraModel.from_pretrained(folder, base_model=tiny_llama())
    with pytest.raises(StateError, match="already has an adapter 'default'"):
        model.load_adapter(folder)


# Tensors of a file ---------------------------------------------------------------------------------------------------


def test_every_fault_of_the_tensors_is_listed_at_once(folder: Path) -> None:
    q, down = f"{PREFIX}.0.self_attn.q_proj", f"{PREFIX}.1.mlp.down_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}.0.self_attn.k_proj.lora_A.weight"] = torch.ones(4, 32)
        del tensors[f"{down}.lora_B.weight"]
        tensors[f"{q}.lora_A.weight"] = torch.ones(4, 31)
        tensors[f"{q}.lora_B.weight"][3, 1] = float("nan")
        tensors[f"{down}.lora_A.weight"][0, 0] = float("inf")

    spoil_tensors(folder, change)
    message = refused(folder)
    assert f"unexpected: {PREFIX}.0.self_attn.k_proj.lora_A.weight [4, 32]" in message
    assert f"missing: {down}.lora_B.weight [32, 4]" in message
    assert f"shape: {q}.lora_A.weight is [4, 31] in the file, [4, 32] in the model" in message
    assert f"values: {q}.lora_B.weight holds NaN or infinity" in message
    assert f"values: {down}.lora_A.weight holds NaN or infinity" in message
    assert message.count("\n  - ") == 5
    assert "from_pretrained" in message


def test_a_misspelled_key_is_named_with_the_right_one(folder: Path) -> None:
    key = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"
    wrong = key.replace("q_proj", "q_porj")
    spoil_tensors(folder, lambda tensors: tensors.update({wrong: tensors.pop(key)}))
    message = refused(folder)
    assert f"missing: {key} [4, 32] (did you mean '{wrong}'?)" in message


def test_a_file_of_another_depth_or_width(saved: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"unexpected: .*layers\.1\.") as caught:
        LoraModel.from_pretrained(saved, base_model=tiny_llama(layers=1), allow_other_base=True)
    assert "model.layers.1.mlp.down_proj.lora_A.weight" in str(caught.value)
    with pytest.raises(AdapterFileError, match=r"shape: "):
        LoraModel.from_pretrained(saved, base_model=tiny_llama(hidden_size=48), allow_other_base=True)


def test_load_adapter_weights_is_as_strict(folder: Path) -> None:
    model = randomize(apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=TARGETS)), seed=9)
    before = snapshot(model)
    spoil_tensors(folder, lambda t: (t.popitem(), t.update({"base_model.model.x": torch.ones(1)})))
    with pytest.raises(AdapterFileError, match=r"missing(.|\n)*unexpected: base_model\.model\.x"):
        model.load_adapter_weights(folder)
    assert_same_tensors(snapshot(model), before)


def test_load_state_dict_with_keys_that_match_nothing(saved: Path) -> None:
    model = randomize(apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=TARGETS)), seed=9)
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match="none of the 2 keys"):
        model.load_state_dict({"a.b": torch.ones(1), "c": torch.ones(1)}, strict=False)
    tensors = load_file(saved / WEIGHTS_NAME)
    with pytest.raises(AdapterFileError, match="unexpected"):
        model.load_state_dict({k.replace("q_proj", "x_proj"): v for k, v in tensors.items()}, strict=False)
    assert_same_tensors(snapshot(model), before)
    model.load_state_dict(tensors)
    assert all(torch.equal(model.get_adapter_state_dict()[k], v) for k, v in tensors.items())
    model.delete_adapter("default")
    with pytest.raises(StateError, match="no adapter is active"):
        model.load_state_dict(tensors)


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 5, 200, -1], ids=["empty", "5 bytes", "header cut", "last byte gone"])
def test_a_truncated_file(folder: Path, kept: int) -> None:
    whole = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(whole[:kept])
    message = refused(folder)
    assert WEIGHTS_NAME in message
    assert "not a complete safetensors file" in message


def test_a_file_of_another_kind(folder: Path) -> None:
    (folder / WEIGHTS_NAME).write_bytes(pickle.dumps({"a": 1}) * 100)
    assert "not a complete safetensors file" in refused(folder)
    save_file({}, folder / WEIGHTS_NAME)
    assert "no tensors" in refused(folder)


@pytest.mark.parametrize("name", [CONFIG_NAME, EXTRAS_NAME])
def test_broken_json(folder: Path, name: str) -> None:
    text = (folder / name).read_text()
    (folder / name).write_text(text[: len(text) // 2])
    assert f"{name} is not valid JSON" in refused(folder)
    (folder / name).write_text("[1, 2]")
    assert f"{name} contains list" in refused(folder)


def test_a_config_with_broken_fields_lists_them(folder: Path) -> None:
    spoil_json(folder, r="many", lora_dropout=2, bias="some", rank_pattern=[1], use_qalora=True)
    message = refused(folder)
    for fault in ("r='many'", "lora_dropout=2", "bias='some'", "rank_pattern", "use_qalora=True"):
        assert fault in message
    assert CONFIG_NAME in message


def test_a_missing_folder_file_or_config(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()
    assert WEIGHTS_NAME in refused(folder)
    (folder / CONFIG_NAME).unlink()
    assert f"no {CONFIG_NAME}" in refused(folder)
    with pytest.raises(AdapterFileError, match="does not exist"):
        read_adapter(tmp_path / "absent")
    message = refused(tmp_path / "absent")
    assert "is not a local folder" in message


def test_a_folder_of_folders_names_the_adapters_in_it(tmp_path: Path) -> None:
    model = apply_lora(tiny_llama(), LoraConfig(r=2), adapter_name="english")
    model.add_adapter("french", LoraConfig(r=2))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / CONFIG_NAME).exists()
    message = refused(tmp_path)
    assert "english, french" in message
    LoraModel.from_pretrained(tmp_path / "french", base_model=tiny_llama())


@pytest.mark.parametrize("name", ["new_embeddings.safetensors", "new_embeddings.bin"])
def test_embeddings_of_added_tokens_beside_the_adapter_are_not_ignored(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    assert name in refused(folder)


# Old pickled files ---------------------------------------------------------------------------------------------------


class Attack:
    """Runs a command where a pickle of it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_an_old_pickled_file_is_converted_on_demand_only(folder: Path, saved: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    (folder / WEIGHTS_NAME).unlink()
    (folder / EXTRAS_NAME).unlink()
    torch.save(tensors, folder / LEGACY_WEIGHTS_NAME)
    assert "hf-lora convert" in refused(folder)
    converted = convert_adapter(folder, tmp_path / "new")
    assert converted.tensors.keys() == tensors.keys()
    batch = batch_of(tiny_llama())
    expected = LoraModel.from_pretrained(saved, base_model=tiny_llama())(**batch).logits
    found = LoraModel.from_pretrained(tmp_path / "new", base_model=tiny_llama())(**batch).logits
    assert torch.equal(found, expected)


def test_a_malicious_pickle_is_refused_and_does_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()
    torch.save({"x": Attack(tmp_path / "pwned")}, folder / LEGACY_WEIGHTS_NAME)
    with pytest.raises(AdapterFileError, match="could not be read as a file with only tensors"):
        convert_adapter(folder, tmp_path / "new")
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "new").exists()


def test_a_pickle_of_more_than_tensors(folder: Path, saved: Path, tmp_path: Path) -> None:
    torch.save({"x": 3}, folder / LEGACY_WEIGHTS_NAME)
    with pytest.raises(AdapterFileError, match="more than tensors"):
        convert_adapter(folder, tmp_path / "new")
    with pytest.raises(AdapterFileError, match="nothing to convert"):
        convert_adapter(saved, tmp_path / "new")


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_pointer_of_git_lfs_is_named(folder: Path, name: str) -> None:
    oid = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 12345\n"
    (folder / name).write_text(text)
    assert "git lfs pull" in refused(folder)

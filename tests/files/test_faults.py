"""Loud failures: each fault of a file or a save is an error that lists them all, and nothing was changed before it."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch_of
from helpers import assert_same_tensors, randomize, snapshot, tiny_bert, tiny_llama, tiny_t5
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file

import hf_lora.files.format as file_format
from hf_lora import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    LoraConfig,
    LoraError,
    LoraModel,
    StateError,
    TargetError,
    apply_lora,
    convert_adapter,
)
from hf_lora.files.format import CONFIG_NAME, EXTRAS_NAME, LEGACY_WEIGHTS_NAME, WEIGHTS_NAME, read_adapter

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


# Bases ---------------------------------------------------------------------------------------------------------------


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


# Saving --------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_pointer_of_git_lfs_is_named(folder: Path, name: str) -> None:
    oid = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 12345\n"
    (folder / name).write_text(text)
    assert "git lfs pull" in refused(folder)

"""The base of an adapter is the weights that it was trained on, whatever the files say that they were loaded from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_near, randomize, tiny_bert, tiny_llama, token_ids

from hf_lora import BaseMismatchError, LoraConfig, LoraModel, apply_lora
from hf_lora.files.identity import differs, identify

LLAMA = type(tiny_llama())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    tiny_llama().save_pretrained(folder / "base")
    return folder / "base"


def load(base: Path, **kwargs: Any) -> Any:
    return LLAMA.from_pretrained(base, **kwargs)


def merged(scale: float, target: str = "q_proj") -> Callable[[Any], Any]:
    """Continued training: another adapter was merged into the base before."""
    config = LoraConfig(r=2, target_modules=[target])
    return lambda model: randomize(apply_lora(model, config), 2, scale).merge_and_unload()


@torch.no_grad()
def edited(model: Any) -> Any:
    model.model.layers[1].mlp.down_proj.weight.mul_(1.001)
    return model


@torch.no_grad()
def edited_norm(model: Any) -> Any:
    model.model.norm.weight.add_(1e-3)
    return model


def loaded_again(model: Any) -> Any:
    model.load_state_dict(tiny_llama(seed=4).state_dict())
    return model


def resized(model: Any) -> Any:
    model.resize_token_embeddings(60)
    return model


OTHER: dict[str, Callable[[Any], Any]] = {
    "merged": merged(0.1), "merged a little": merged(1e-3, "down_proj"), "edited": edited, "a norm": edited_norm,
    "loaded again": loaded_again, "merged in bfloat16": lambda model: merged(0.1)(model.to(torch.bfloat16)),
}  # fmt: skip
SAME: dict[str, Callable[[Path], Any]] = {
    "plain": load,
    "bfloat16": lambda base: load(base, dtype=torch.bfloat16),
    "bfloat16, later": lambda base: load(base).to(torch.bfloat16),
    "float16 and back": lambda base: load(base, dtype=torch.float16).float(),
    "float16 and bfloat16": lambda base: load(base, dtype=torch.float16).to(torch.bfloat16),
    "resized": lambda base: resized(load(base)),
    "unloaded": lambda base: randomize(apply_lora(load(base), LoraConfig(r=2))).unload(),
    "unmerged": lambda base: unmerged(load(base)),
}


def unmerged(model: Any) -> Any:
    randomize(apply_lora(model, LoraConfig(r=2))).merge_adapter()
    model.unmerge_adapter()
    return model.unload()


def save(model: Any, folder: Path) -> Any:
    randomize(apply_lora(model, LoraConfig(r=2, target_modules=["v_proj"])), 3, 0.1)
    model.save_pretrained(folder)
    return model


def marks(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "hf_lora.json").read_text())["base"]
    return values


@pytest.mark.parametrize("case", OTHER)
def test_a_base_that_was_changed_in_memory_is_another_one(
    case: str, base: Path, tmp_path: Path, messages: list[str]
) -> None:
    other = OTHER[case](load(base))
    other.save_pretrained(tmp_path / "changed")
    messages.clear()
    expected = save(other, tmp_path / "adapter").eval()(token_ids()).logits
    assert any("save this base before apply_lora" in each for each in messages)
    assert "files" not in marks(tmp_path / "adapter")
    for given in (None, base, load(base)):
        with pytest.raises(BaseMismatchError, match="in training were not those of its files"):
            LoraModel.from_pretrained(tmp_path / "adapter", base_model=given)
    if case != "a norm":  # the hash of files does not see it
        loaded = LoraModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "changed")  # as advised
        assert_near(loaded(token_ids()).logits, expected, expected.dtype, 16)
    save(load(base), tmp_path / "plain")  # and the reverse
    with pytest.raises(BaseMismatchError, match="in memory were not those of its files"):
        LoraModel.from_pretrained(tmp_path / "plain", base_model=OTHER[case](load(base)))
    LoraModel.from_pretrained(tmp_path / "plain", base_model=OTHER[case](load(base)), allow_other_base=True)


@pytest.mark.parametrize("case", SAME)
def test_a_base_in_another_dtype_or_size_is_the_same(
    case: str, base: Path, tmp_path: Path, messages: list[str]
) -> None:
    save(SAME[case](base), tmp_path / "adapter")
    assert not messages
    assert {"files", "weights"} <= marks(tmp_path / "adapter").keys()
    LoraModel.from_pretrained(tmp_path / "adapter", base_model=None if case != "resized" else load(base))
    save(load(base), tmp_path / "plain")
    if case != "resized":
        LoraModel.from_pretrained(tmp_path / "plain", base_model=SAME[case](base))


def test_files_of_another_layout_or_dtype_are_of_the_same_base(base: Path, tmp_path: Path) -> None:
    save(load(base), tmp_path / "adapter")
    load(base).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    load(base).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    for name in ("shards", "half"):
        LoraModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / name)


def test_weights_that_are_loaded_below_an_adapter_are_its_base(base: Path, tmp_path: Path) -> None:
    model = apply_lora(load(base), LoraConfig(r=2, target_modules=["v_proj"]))
    randomize(model)
    model.save_pretrained(tmp_path / "before")
    model.load_state_dict(tiny_llama(seed=4).state_dict(), strict=False)
    model.save_pretrained(tmp_path / "after")
    with pytest.raises(BaseMismatchError, match="in training were not those of its files"):
        LoraModel.from_pretrained(tmp_path / "after")
    LoraModel.from_pretrained(tmp_path / "after", base_model=tiny_llama(seed=4))
    with pytest.raises(BaseMismatchError):
        model.load_adapter(tmp_path / "before", "second")


def test_a_file_of_before_with_the_marks_of_a_merged_base(base: Path, tmp_path: Path) -> None:
    """Its files were those of the disk, its weights those of the memory: both must agree."""
    save(load(base), tmp_path / "adapter")
    save(merged(0.3)(load(base)), tmp_path / "other")
    path = tmp_path / "adapter" / "hf_lora.json"
    values = json.loads(path.read_text())
    values["base"]["weights"] = marks(tmp_path / "other")["weights"]
    path.write_text(json.dumps(values))
    with pytest.raises(BaseMismatchError, match="its weights differ"):
        LoraModel.from_pretrained(tmp_path / "adapter")


def test_a_new_head_is_no_part_of_the_base(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    model = type(tiny_bert()).from_pretrained(tmp_path / "base")
    model.classifier.reset_parameters()
    randomize(apply_lora(model, LoraConfig(r=2, modules_to_save=["classifier"])))
    model.save_pretrained(tmp_path / "adapter")
    assert "files" in marks(tmp_path / "adapter")
    LoraModel.from_pretrained(tmp_path / "adapter")


def test_the_commit_in_the_cache_is_the_one_with_these_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commits = ["a" * 40, "b" * 40]
    for seed, commit in enumerate(commits):
        tiny_llama(seed).save_pretrained(tmp_path / "models--user--base" / "snapshots" / commit)
    (tmp_path / "models--user--base" / "refs").mkdir()
    (tmp_path / "models--user--base" / "refs" / "main").write_text(commits[0])
    for seed, expected in ((0, commits[0]), (1, commits[1]), (2, None)):
        model = tiny_llama(seed)
        model.config._name_or_path = "user/base"
        assert identify(model).get("commit") == expected


@pytest.mark.parametrize("tensor", ["model.layers.1.input_layernorm.weight", "model.norm.weight"])
@pytest.mark.parametrize("files", [True, False], ids=["in files", "in memory"])
def test_a_base_that_differs_in_a_norm_alone(files: bool, tensor: str, base: Path, tmp_path: Path) -> None:
    """Its files are as large, and its matrices are the same."""
    other = load(base)
    with torch.no_grad():
        other.get_parameter(tensor).mul_(1.02)
    other.save_pretrained(tmp_path / "other")
    other = load(tmp_path / "other")
    save(load(base), tmp_path / "adapter")
    if not files:
        other.config._name_or_path = ""
    with pytest.raises(BaseMismatchError, match=r"its (files and its )?weights differ"):
        LoraModel.from_pretrained(tmp_path / "adapter", base_model=other)
    file = tmp_path / "adapter" / "hf_lora.json"
    values = json.loads(file.read_text())
    assert len(json.dumps(values["base"]["vectors"])) < 100 * len(values["base"]["vectors"])
    del values["base"]["vectors"]  # as earlier versions wrote it
    file.write_text(json.dumps(values))
    LoraModel.from_pretrained(tmp_path / "adapter", base_model=other)
    LoraModel.from_pretrained(tmp_path / "adapter", base_model=load(base, dtype=torch.bfloat16))


def test_a_quantized_base_with_equal_norms_is_not_taken_for_the_same() -> None:
    """Adapters do not change norms, so these are those of many bases; without matrices, the files decide."""
    marks = {"vectors": identify(tiny_llama())["vectors"]}
    assert differs(marks, marks) is None
    assert differs(marks | {"files": "a"}, marks | {"files": "b"}) is not None
    assert differs(marks | {"files": "a"}, marks | {"files": "a"}) is None

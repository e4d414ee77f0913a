"""A base from the Hub, merged without loading: its files, their commit, and what goes wrong on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize, run_command, tiny_llama, token_ids
from hub.conftest import contents
from huggingface_hub import constants
from transformers import LlamaForCausalLM

from hf_lora import HubError, LoraModel, apply_lora
from hf_lora.hub.base import local_base
from hf_lora.testing import LocalHub

WEIGHTS = "GET /user/base/resolve/*/model.safetensors"


@pytest.fixture
def pushed(with_base: LocalHub, adapter_folder: Path) -> LocalHub:
    """`user/base` and, in a folder of `user/ad`, the adapter that was trained on its first commit."""
    randomize(apply_lora(LlamaForCausalLM.from_pretrained("user/base"))).push_to_hub("user/ad", subfolder="mine")
    shutil.rmtree(constants.HF_HUB_CACHE)
    with_base.clear()
    return with_base


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(token_ids()).logits
    return found


def test_names_on_the_hub_are_merged_with_the_base_of_the_training(pushed: LocalHub, tmp_path: Path) -> None:
    tiny_llama(seed=9).save_pretrained(tmp_path / "new")
    pushed.add_files("user/base", tmp_path / "new")  # the base goes on
    run_command("merge", "user/base", "user/ad", tmp_path / "out", "--subfolder", "mine", "--quiet")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(merged), logits(LoraModel.from_pretrained("user/ad", subfolder="mine", merge=True)))
    told = run_command(
        "merge", "user/base", "user/ad", tmp_path / "two", "--subfolder", "mine", "--base-revision", "main", code=2
    ).stderr
    assert "this is another base model" in told
    pushed.clear()
    told = run_command("merge", "user/base", "user/none", tmp_path / "three", code=2).stderr
    assert "no model repository user/none" in told
    assert not pushed.asked("* /user/base/*"), "the small one is looked for first"
    told = run_command("merge", "user/none", "user/ad", tmp_path / "four", "--subfolder", "mine", code=2).stderr
    assert "downloading the base 'user/none': there is no model repository user/none" in told
    assert run_command("inspect", "user/ad", "--subfolder", "mine").output.count("self_attn.q_proj") == 2


def test_only_the_files_of_one_form_of_the_model_are_brought(hub: LocalHub, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    hub.add_repo("user/base", tmp_path / "sharded")
    other = ("consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "onnx/model.onnx", "code.py")
    hub.add_files("user/base", dict.fromkeys(other, b"another form") | {"tokenizer.json": b"{}"})
    found = contents(local_base("user/base"))
    assert found == contents(tmp_path / "sharded") | {"tokenizer.json": b"{}"}
    assert len([name for name in found if name.endswith(".safetensors")]) > 1


@pytest.mark.parametrize("kind", ["drop", "lose", "stall", "truncate", "corrupt"])
def test_a_base_arrives_as_the_hub_has_it(
    with_base: LocalHub, base_folder: Path, waits: list[float], kind: str
) -> None:
    fault = with_base.fail(WEIGHTS, kind)
    assert contents(local_base("user/base")) == contents(base_folder)
    assert fault.fired == 1


def test_a_base_that_never_arrives_whole_is_not_kept(with_base: LocalHub, waits: list[float]) -> None:
    with_base.fail(WEIGHTS, "corrupt", times=99)
    with pytest.raises(HubError, match=r"model.safetensors was downloaded three times"):
        local_base("user/base")
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


def test_without_a_network_the_cache_is_used(
    with_base: LocalHub, base_folder: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    LlamaForCausalLM.from_pretrained("user/base")  # another program brought what it needs of it
    with_base.fail("* *", "drop", times=10_000)
    assert (local_base("user/base") / "model.safetensors").is_file()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (local_base("user/base") / "model.safetensors").is_file()
    (local_base("user/base") / "model.safetensors").unlink()
    with pytest.raises(HubError, match=r"does not have user/base at 'main'. Download it once .*hf download user/base"):
        local_base("user/base")


def test_a_base_that_could_not_be_loaded(with_base: LocalHub) -> None:
    with_base.add_repo("user/gated", {"config.json": b"{}"}, gated=True)
    for name, revision, words in [
        ("user/none", None, "no model repository user/none"),
        ("user/base", "v9", "no branch, tag or commit 'v9'. It has main."),
        ("user/gated", None, "gated. Ask for access"),
        ("a/b/c", None, "not a valid repository name"),
        ("x" * 300, None, "not a valid repository name"),
    ]:
        token = with_base.add_user("guest") if name == "user/gated" else None
        with pytest.raises(HubError, match=words):
            local_base(name, revision, token)
    with_base.add_repo("user/broken", {"config.json": b"{}", "model.safetensors.index.json": json.dumps([1]).encode()})
    assert (local_base("user/broken") / "config.json").is_file()  # what is wrong with it is said by who merges

"""Pulling with the real client: what comes down, from where, and what each refusal says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize, run_command, tiny_llama
from hub.conftest import ADAPTER, EXPECTED, contents, logits, put
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from hf_lora import AdapterFileError, BaseMismatchError, HubError, LoraConfig, LoraModel, apply_lora, pull, push
from hf_lora.hub.download import local_adapter
from hf_lora.testing import LocalHub


def test_one_commit_and_only_what_an_adapter_needs(hub: LocalHub, adapter_folder: Path) -> None:
    put(hub, adapter_folder)
    hub.add_files("user/ad", {"model.bin": b"x", "optimizer.pt": b"x", "checkpoint-3/adapter_config.json": b"{}"})
    hub.clear()
    commit = hub.commits("user/ad")[0].oid
    folder = pull("user/ad")
    assert folder.name == commit
    assert contents(folder).keys() == EXPECTED - {"README.md"}
    files = hub.asked("* /user/ad/resolve/*")
    assert files
    assert all(f"/resolve/{commit}/" in line.path for line in files)
    hub.clear()
    pull("user/ad")
    assert len(hub.requests) == 1, "what the revision is, and what files it has"


def test_without_a_network_the_cache_is_used(
    model: Any, hub: LocalHub, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    from huggingface_hub import constants

    model.push_to_hub("user/ad")
    expected = logits(LoraModel.from_pretrained("user/ad"))
    hub.clear()
    hub.fail("* *", "drop", times=10_000)
    assert torch.equal(logits(LoraModel.from_pretrained("user/ad", local_files_only=True)), expected)
    assert not hub.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits(LoraModel.from_pretrained("user/ad")), expected)
    with pytest.raises(HubError, match=r"does not have user/other at 'main'. Download it once"):
        LoraModel.from_pretrained("user/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert pull("user/ad").is_dir()  # the Hub does not answer: a warning, and the cache


def test_each_refusal_says_what_to_do(hub: LocalHub, adapter_folder: Path, waits: list[float]) -> None:
    put(hub, adapter_folder)
    put(hub, adapter_folder, "user/secret", private=True)
    put(hub, adapter_folder, "user/gated", gated=True)
    hub.add_repo("user/empty", {"notes.txt": b"x"})
    hub.add_repo("user/half", {"adapter_config.json": b"{}"})
    hub.add_repo("user/old", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    hub.add_repo("user/huge", {"adapter_config.json": b" " * 5_000_000, "adapter_model.safetensors": b"x"})
    guest = hub.add_user("guest")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("user/absent", {}, "no model repository user/absent .* or it is private and the token has no access"),
        ("user/secret", {"token": guest}, "private and the token has no access"),
        ("user/gated", {"token": guest}, f"gated. Ask for access at {hub.url}/user/gated"),
        ("user/ad", {"token": "hf_wrong_token"}, "401.*the token is not valid"),
        ("user/ad", {"revision": "v9"}, "no branch, tag or commit 'v9'. It has main."),
        ("user/empty", {}, r"is not an adapter \(no adapter_config.json\). It holds .*notes.txt"),
        ("user/half", {}, "no adapter_model.safetensors: the adapter is incomplete"),
        ("user/old", {}, "a pickle, which is not downloaded.*hf-lora convert"),
        ("user/huge", {}, "adapter_config.json is larger than 4,194,304 bytes. It was not downloaded."),
        ("no/such/name", {}, "not a valid repository name"),
        ("x" * 300, {}, "not a valid repository name"),
    ]
    for repo_id, kwargs, words in cases:
        with pytest.raises(AdapterFileError, match=words):
            local_adapter(repo_id, **kwargs)
    assert not hub.asked("GET */user/huge/resolve/*")
    assert not waits, "none of these passes"
    hub.repo("user/gated").readers.add("guest")
    assert pull("user/gated", token=guest).is_dir()
    with (
        pytest.raises(HubError, match=r"there is no token. .*hf auth login"),
        hub.active(adapter_folder.parent, None),
    ):
        pull("user/secret", token=False)


def test_the_base_is_that_of_the_training(model: Any, hub: LocalHub, base_folder: Path, tmp_path: Path) -> None:
    model.push_to_hub("user/ad")
    commit = hub.commits("user/base")[0].oid
    assert json.loads(hub.files("user/ad")["hf_lora.json"])["base"]["commit"] == commit
    expected = logits(model)
    tiny_llama(seed=9).save_pretrained(tmp_path / "new")
    hub.add_files("user/base", tmp_path / "new")
    hub.clear()
    assert torch.equal(logits(LoraModel.from_pretrained("user/ad")), expected)
    assert all(commit in line.path for line in hub.asked("* /user/base/*"))
    with pytest.raises(BaseMismatchError, match="another base model"):
        LoraModel.from_pretrained("user/ad", base_revision="main")
    hub.add_repo("user/base", base_folder)
    hub.add_files("user/base", {"README.md": b"written anew, so that the commit is gone"})
    del hub.repo("user/base").commits[commit]
    import huggingface_hub

    shutil.rmtree(Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--user--base")
    with pytest.raises(HubError, match=f"at commit {commit}.*base_revision='main'"):
        LoraModel.from_pretrained("user/ad")
    assert torch.equal(logits(LoraModel.from_pretrained("user/ad", base_revision="main")), expected)


@pytest.mark.parametrize("ours", [True, False])
def test_a_base_that_is_an_adapter_on_the_hub(ours: bool, model: Any, with_base: LocalHub, tmp_path: Path) -> None:
    """With PEFT installed, transformers itself loads such a base, with PEFT's layers in it."""
    import peft

    model.push_to_hub("user/first")
    merged = LoraModel.from_pretrained("user/first", merge=True)
    config = {"target_modules": ["k_proj"], "init_lora_weights": False}
    second: Any = (
        apply_lora(merged, LoraConfig(**config)) if ours else peft.get_peft_model(merged, peft.LoraConfig(**config))
    )
    second.eval().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text()) | {"task_type": None if ours else "CAUSAL_LM"}
    path.write_text(json.dumps(values | {"base_model_name_or_path": "user/first"}))
    assert torch.allclose(logits(LoraModel.from_pretrained(tmp_path)), logits(second), atol=1e-5)


def test_a_repository_that_peft_wrote(with_base: LocalHub, tmp_path: Path) -> None:
    import peft

    theirs = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained("user/base"), peft.LoraConfig(target_modules=["q_proj"])
    )
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "peft")
    with_base.add_repo("user/peft", tmp_path / "peft")
    ours = LoraModel.from_pretrained("user/peft")
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert "hf_lora.json" not in with_base.files("user/peft")


def test_pull_into_a_folder(hub: LocalHub, adapter_folder: Path, tmp_path: Path) -> None:
    put(hub, adapter_folder)
    output = run_command("pull", "user/ad", tmp_path / "out").output
    assert str(tmp_path / "out") in output
    assert contents(tmp_path / "out") == {name: (adapter_folder / name).read_bytes() for name in EXPECTED}
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert "is not empty" in run_command("pull", "user/ad", tmp_path / "out", code=2).stderr
    run_command("pull", "user/ad", tmp_path / "out", "--overwrite")
    assert "snapshots" in run_command("pull", "user/ad", "--offline").output
    with pytest.raises(AdapterFileError, match=r"could not be created .*Name another folder"):
        pull("user/ad", adapter_folder / "README.md" / "out")


def test_nothing_is_left_of_an_adapter_that_is_replaced(hub: LocalHub, adapter_folder: Path, tmp_path: Path) -> None:
    """Another library's adapter has no hf_lora.json: that of ours would tell of another base, and of other labels."""
    theirs = {name: (adapter_folder / name).read_bytes() for name in ADAPTER - {"hf_lora.json"}}
    hub.add_repo("user/theirs", theirs)
    put(hub, adapter_folder)
    out = pull("user/ad", tmp_path / "out")
    (out / "mine.txt").write_text("mine")
    pull("user/theirs", out, overwrite=True)
    assert contents(out).keys() == theirs.keys() | {"mine.txt", "README.md"}
    pull("user/theirs", tmp_path / "theirs")
    push(tmp_path / "theirs", "user/ad")
    assert hub.files("user/ad").keys() == EXPECTED - {"hf_lora.json"}
    push(adapter_folder, "user/ad", subfolder="inner")
    push(tmp_path / "theirs", "user/ad")
    assert "inner/hf_lora.json" in hub.files("user/ad"), "another adapter's"


def test_the_trained_modules_of_a_sentence_vector_travel_too(
    hub: LocalHub, adapter_folder: Path, tmp_path: Path
) -> None:
    folder, weights = tmp_path / "made", "2_Dense/model.safetensors"
    for name in (*ADAPTER, "hf_lora.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(adapter_folder / name, folder / name)
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", weights, "0_Base/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}" if name.endswith("json") else "the weights", encoding="utf-8")
    push(folder, "user/vector")
    assert "0_Base/model.safetensors" not in hub.files("user/vector")  # the base's
    pull("user/vector", tmp_path / "out")
    assert (tmp_path / "out" / weights).read_text(encoding="utf-8") == "the weights"

"""What a Trainer pushes with each `hub_strategy`: the adapter's own files, a checkpoint where asked, never a token."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import sentences, tiny_bert

from hf_lora import HubError, LoraTrainer
from hf_lora.testing import LocalHub

Make = Callable[..., Any]
OWN = {"README.md", "adapter_config.json", "adapter_model.safetensors", "hf_lora.json"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub() as running, running.active(tmp_path / "home"):
        yield running


def trainer(arguments: Make, strategy: str, **values: Any) -> LoraTrainer:
    args = arguments(
        max_steps=4, save_strategy="steps", save_steps=2, push_to_hub=True, hub_strategy=strategy,
        hub_always_push=True,        hub_model_id="user/run", **values,
    )  # fmt: skip
    return LoraTrainer(model=tiny_bert(), args=args, train_dataset=sentences())


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_every_strategy(arguments: Make, hub: LocalHub, strategy: str, tmp_path: Path) -> None:
    run = trainer(arguments, strategy, hub_token=hub.token)
    run.train()
    during = [commit.title for commit in hub.commits("user/run")][:-1]
    steps = ["Training in progress, step 4", "Training in progress, step 2"]
    assert during == ([] if strategy == "end" else steps), "one commit a save"
    done = run.push_to_hub()
    assert hub.commits("user/run")[0].oid == done.oid
    files = hub.files("user/run")
    assert {name for name in files if "/" not in name} - {"training_loss.png"} == OWN
    inside = {"end": set(), "every_save": set(), "checkpoint": {"last-checkpoint"}}
    folders = {name.partition("/")[0] for name in files if "/" in name}
    assert folders == inside.get(strategy, {"checkpoint-2", "checkpoint-4"})
    saved = Path(run.args.output_dir, "adapter_model.safetensors").read_bytes()
    assert files["adapter_model.safetensors"] == saved
    assert not any(hub.token.encode() in data for data in files.values()), "training_args.bin holds it"
    if strategy == "checkpoint":
        folder = tmp_path / "last" / "checkpoint-4"
        for name, data in files.items():
            if name.startswith("last-checkpoint/"):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name.removeprefix("last-checkpoint/")).write_bytes(data)
        again = trainer(arguments, "end", name="again", hub_token=hub.token)
        again.args.max_steps = 6
        again.train(resume_from_checkpoint=str(folder))
        assert again.state.global_step == 6


def test_a_push_that_fails_stops_no_training(
    arguments: Make, hub: LocalHub, messages: list[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail("POST */commit/*", "status", status=403, times=10_000)
    run = trainer(arguments, "every_save", hub_token=hub.token)
    run.train()
    assert run.state.global_step == 4
    assert any("background push failed" in text and "403" in text for text in messages)
    with pytest.raises(HubError, match="403"):
        run.push_to_hub()
    hub.clear()
    run.push_to_hub()
    assert set(hub.files("user/run")) - {"training_loss.png"} == OWN


def test_a_full_disk_of_temporary_files_stops_no_training(
    arguments: Make, hub: LocalHub, messages: list[str], monkeypatch: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = trainer(arguments, "checkpoint", hub_token=hub.token)
    monkeypatch.setattr("hf_lora.train.checkpoint.pushing._copied", full)
    run.train()
    assert run.state.global_step == 4
    assert any("training continues without this push" in text and "No space" in text for text in messages)
    assert hub.files("user/run") == {}


def test_a_repository_that_cannot_be_made_is_said_before_training(arguments: Make, hub: LocalHub) -> None:
    with pytest.raises(HubError, match=r"creating the repository 'user/run'.*may not write"):
        trainer(arguments, "end", hub_token=hub.add_user("guest"))
    assert not hub.api.repos


def test_it_waits_where_asked_and_names_the_branch(arguments: Make, hub: LocalHub) -> None:
    run = trainer(arguments, "end", hub_revision="next", hub_private_repo=True)
    job = run.push_to_hub(blocking=False, commit_message="Mine")
    assert job.result(timeout=60).oid == hub.commits("user/run", "next")[0].oid
    assert hub.commits("user/run", "next")[0].title == "Mine"
    assert hub.files("user/run") == {}
    assert hub.repo("user/run").private
    config = json.loads(hub.files("user/run", "next")["adapter_config.json"])
    assert config["peft_type"] == "LORA"

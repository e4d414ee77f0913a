"""`hf-lora train --push-to-hub`: one commit at the end, with adapter, card and results."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from helpers import run_command

from hf_lora.testing import Fault, LocalHub

FAST = ("--num-train-epochs", "2", "--per-device-train-batch-size", "12", "--use-cpu", "--disable-tqdm", "true",
        "--logging-strategy", "no")  # fmt: skip


@pytest.mark.parametrize("fails", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_is_pushed_as_one_commit(fails: bool, bert_folder: str, texts_folder: Path, tmp_path: Path) -> None:
    rows, out = texts_folder / "rows.csv", tmp_path / "out"
    words = ("--model", bert_folder, "--train-file", rows, "--test-file", rows, "--output-dir", out)
    with LocalHub() as hub, hub.active(tmp_path / "home"):
        if fails:
            hub._running().faults.append(Fault("POST *commit*", "status", status=403, times=9))
        done = run_command(
            "train", *words, "--push-to-hub", "--hub-model-id", "user/mine", *FAST, code=2 if fails else 0
        )
        if fails:
            command = shlex.split(done.stderr.splitlines()[-1].partition("with: ")[2])
            assert command == ["hf-lora", "push", str(out), "user/mine"]
            hub.clear()
            run_command(*command[1:])
        else:
            assert f"pushed: {hub.url}/user/mine/commit/" in done.stdout
        files = hub.files("user/mine")
        assert len(hub.commits("user/mine")) == 2  # the first is the Hub's own
    wanted = {"adapter_config.json", "adapter_model.safetensors", "hf_lora.json", "README.md", "tokenizer.json"}
    assert wanted <= files.keys()
    assert not any("checkpoint" in name or "training_args" in name for name in files)
    accuracy = json.loads((out / "test_results.json").read_text())["test_accuracy"]
    assert f"{accuracy:.4g}" in files["README.md"].decode()
    assert files["adapter_model.safetensors"] == (out / "adapter_model.safetensors").read_bytes()

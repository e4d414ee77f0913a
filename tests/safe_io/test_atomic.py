"""The files of an adapter take their places together: killed at any moment, a save leaves the old or the new ones."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ending_at, randomize, tiny_llama
from safetensors.torch import load_file

from hf_lora import AdapterFileError, LoraConfig, apply_lora
from hf_lora.files.format import CONFIG_NAME, EXTRAS_NAME, WEIGHTS_NAME, read_adapter, read_config
from hf_lora.safe_io.atomic import JOURNAL_NAME, finish_moves, is_full, replace_together
from hf_lora.train.checkpoint.manifest import _sha256

NAMES = {CONFIG_NAME, WEIGHTS_NAME, EXTRAS_NAME}


def adapted(r: int, target: str) -> Any:
    return randomize(apply_lora(tiny_llama(), LoraConfig(r=r, target_modules=[target])), seed=r)


def saved_until(model: Any, folder: Path, end: int) -> bool:
    """Save in a process that kills itself at a moment, counted over moves, syncs and deletions; whether it ended."""
    pid = os.fork()
    if pid == 0:
        try:
            ending_at(end, lambda: model.save_pretrained(folder))
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_killed_at_every_moment(tmp_path: Path) -> None:
    old, new = adapted(4, "q_proj"), adapted(2, "v_proj")
    expected = {4: old.get_adapter_state_dict(), 2: new.get_adapter_state_dict()}
    seen = []
    for end in range(200):
        folder = tmp_path / str(end)
        old.save_pretrained(folder)
        ended = saved_until(new, folder, end)
        found = read_adapter(folder)
        tensors = expected[found.config.r]
        assert found.tensors.keys() == tensors.keys()
        assert all(torch.equal(found.tensors[k], v) for k, v in tensors.items())
        assert not (folder / JOURNAL_NAME).exists()
        seen.append(found.config.r)
        old.save_pretrained(folder)  # a later save is not troubled by what is left
        assert read_adapter(folder).config.r == 4
        if ended:
            break
    assert ended
    assert seen == sorted(seen, reverse=True)  # old ones, then new ones: one moment decides
    assert seen.count(4) > 4
    assert seen.count(2) > 4


def test_a_first_save_that_is_killed_leaves_no_adapter_or_a_whole_one(tmp_path: Path) -> None:
    model, found = adapted(2, "v_proj"), []
    for end in range(0, 200, 2):
        ended = saved_until(model, tmp_path / str(end), end)
        try:
            found.append(read_adapter(tmp_path / str(end)).config.r)
        except AdapterFileError:
            found.append(0)
            assert not NAMES & {p.name for p in (tmp_path / str(end)).iterdir()}
        if ended:
            break
    assert found == sorted(found)
    assert set(found) == {0, 2}


def test_half_written_files_of_long_ago_are_removed(tmp_path: Path) -> None:
    for name, age in (("old", 7200), ("new", 0)):
        left = tmp_path / f".{WEIGHTS_NAME}.{name}.tmp"
        left.write_text("half")
        os.utime(left, (time.time() - age, time.time() - age))
    adapted(2, "v_proj").save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == NAMES | {f".{WEIGHTS_NAME}.new.tmp"}


@pytest.mark.parametrize("text", ['{"../x": "y"}', '{"x": "../../y"}', '{"x": 3}', "[]", "{"])
def test_a_journal_that_is_not_ours_moves_nothing(tmp_path: Path, text: str) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "y").write_text("kept")
    (tmp_path / "y").write_text("kept")
    (inner / JOURNAL_NAME).write_text(text)
    with pytest.raises(AdapterFileError, match=r"moves\.json"):
        finish_moves(inner)
    assert (inner / "y").read_text() == "kept"
    assert (tmp_path / "y").read_text() == "kept"


def test_moves_that_cannot_be_finished_say_where_to_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(2, "v_proj").save_pretrained(tmp_path)
    beside = f".{CONFIG_NAME}.1.tmp"
    (tmp_path / beside).write_text("{}")
    (tmp_path / JOURNAL_NAME).write_text(json.dumps({CONFIG_NAME: beside}))

    def refused(*_: Any) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(os, "replace", refused)
    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(AdapterFileError, match="Copy the folder"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["weights", "text"])
def test_no_space(tmp_path: Path, name: str) -> None:
    """A device that is always full, as the system reports it to safetensors and to Python."""
    resource = pytest.importorskip("resource")
    model = adapted(2, "v_proj")
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / WEIGHTS_NAME).stat().st_size
    save: dict[str, Any] = {
        "weights": lambda: model.save_pretrained(tmp_path),
        "text": lambda: replace_together(tmp_path, {EXTRAS_NAME: lambda file: file.write_text("long text")}),
    }
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2 if name == "weights" else 4, limits[1]))
    try:
        with pytest.raises(AdapterFileError, match="no space is left") as caught:
            save[name]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (WEIGHTS_NAME if name == "weights" else EXTRAS_NAME) in str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_counts_as_full() -> None:
    assert is_full(OSError(28, "No space left on device"))
    assert is_full(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not is_full(OSError(13, "Permission denied"))
    assert not is_full(ValueError("a fault"))


def test_nan_is_written_only_where_it_is_asked_for(tmp_path: Path) -> None:
    model = adapted(2, "v_proj")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(AdapterFileError, match="holds NaN"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    model.save_pretrained(tmp_path, allow_nonfinite=True)
    assert sum(int(t.isnan().sum()) for t in load_file(tmp_path / WEIGHTS_NAME).values()) == 1
    with pytest.raises(AdapterFileError, match="values: "):
        apply_lora(tiny_llama(), LoraConfig(r=2, target_modules=["v_proj"])).load_adapter_weights(tmp_path)


def test_what_is_synced_is_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows flushes no handle without it."""
    fcntl = pytest.importorskip("fcntl")
    modes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    replace_together(tmp_path, {"a": lambda place: place.write_text("a")})
    (tmp_path / "b").write_text("b")
    assert _sha256(tmp_path / "b", sync=True) == hashlib.sha256(b"b").hexdigest()
    files = [mode for mode in modes if mode in (os.O_RDWR, os.O_WRONLY)]
    assert len(files) >= 3

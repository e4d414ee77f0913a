"""A merge from file to file that is killed, and goes on; and its memory, which does not grow with the model."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from file_merge.test_stream import assert_same_bits, layout, save_adapter, save_base, tensors_of
from helpers import tiny_llama

from hf_lora import AdapterFileError, merge_files
from hf_lora.file_merge import ranges, stream
from hf_lora.file_merge.journal import JOURNAL_NAME


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    base = save_base(tiny_llama(layers=4).to(torch.bfloat16), tmp_path, "20KB")
    return base, save_adapter(base, tmp_path, task_type="CAUSAL_LM")


def in_a_child(do: Callable[[], object]) -> int:
    """Exit status of a forked process that does something."""
    child = os.fork()
    if child == 0:
        try:
            do()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying(method: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """`Sink.<method>` that ends the process at its n-th call, without any clean-up."""
    left = [calls]
    original = getattr(stream.Sink, method)

    def maybe(self: object, *args: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        return original(self, *args)

    monkeypatch.setattr(stream.Sink, method, maybe)
    return maybe


def test_killed_three_times_and_continued(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs
    expected = merge_files(base, adapter, tmp_path / "expected")
    out = tmp_path / "out"
    whole: list[set[str]] = []
    for calls in (3, 12, 11):
        with monkeypatch.context() as patch:
            dying("write", calls, patch)
            assert in_a_child(lambda: merge_files(base, adapter, out)) == 9
        whole.append({p.name for p in out.glob("*.safetensors")})
        assert not (out / "config.json").exists()
    assert whole[0] < whole[1] < whole[2] < {p.name for p in base.glob("*.safetensors")}
    kept = {p.name: p.stat().st_ino for p in out.glob("*.safetensors")}
    merge_files(base, adapter, out)
    assert all((out / name).stat().st_ino == place for name, place in kept.items())  # they were not written again
    assert_same_bits(tensors_of(out), tensors_of(expected))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in expected.iterdir()}


@pytest.mark.parametrize("harm", ["a folded byte", "a copied byte", "its end", "its header"])
def test_a_file_that_is_present_and_not_whole_is_written_again(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    base, adapter = inputs
    expected = merge_files(base, adapter, tmp_path / "expected")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        dying("write", 20, patch)
        assert in_a_child(lambda: merge_files(base, adapter, out)) == 9
    found = stream.open_checkpoint(base, stream.Faults("test"))
    name = next(n for n in sorted(json.loads((out / JOURNAL_NAME).read_text())["finished"]) if layout(base)[n][1:])
    entries = {e.name: e for e in next(s for s in found.shards if s.path.name == name).entries}
    folded = next(e for n, e in entries.items() if "_proj" in n)
    copied = next((e for n, e in entries.items() if "_proj" not in n), None)
    if harm == "a copied byte" and copied is None:
        pytest.skip("the layout gave no copies here")
    place = {
        "a folded byte": folded.start + 5,
        "a copied byte": copied.start + 5 if copied else 0,
        "its header": 20,
    }.get(harm)
    content = bytearray((out / name).read_bytes())
    if place is None:
        content = content[:-4]
    else:
        content[place] ^= 255
    (out / name).write_bytes(content)
    merge_files(base, adapter, out)
    assert (out / name).read_bytes() == (expected / name).read_bytes()


def test_a_cut_off_merge_of_other_inputs_is_not_mixed_with(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        dying("write", 20, patch)
        assert in_a_child(lambda: merge_files(base, adapter, out)) == 9
    with pytest.raises(AdapterFileError, match="was cut off"):
        merge_files(base, adapter, out, dtype="float32")
    merge_files(base, adapter, out, dtype="float32", overwrite=True)
    assert_same_bits(tensors_of(out), tensors_of(merge_files(base, adapter, tmp_path / "whole", dtype="float32")))


def test_threads_change_no_bit(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    alone = merge_files(base, adapter, tmp_path / "alone")
    torch.set_num_threads(3)
    try:
        together = merge_files(base, adapter, tmp_path / "together")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert_same_bits(tensors_of(together), tensors_of(alone))


def test_files_between_which_the_system_copies_nothing(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two file systems, of which one reserves no place: the same bytes, and no position that threads would share."""
    base, adapter = inputs
    expected = merge_files(base, adapter, tmp_path / "expected")

    def refuses(*args: object) -> int:
        raise OSError(errno.EXDEV, "other file systems")

    monkeypatch.setattr(ranges, "_copy_file_range", refuses)
    monkeypatch.setattr(ranges, "_fallocate", refuses)
    out = merge_files(base, adapter, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in expected.iterdir()}
    (tmp_path / "source").write_bytes(bytes(range(256)))
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("wb") as target:
        ranges.copy_range(source.fileno(), 50, target.fileno(), 20, 100)
        assert os.lseek(source.fileno(), 0, os.SEEK_CUR) == os.lseek(target.fileno(), 0, os.SEEK_CUR) == 0
    assert (tmp_path / "target").read_bytes() == bytes(20) + bytes(range(50, 150))


def test_a_full_disk_is_found_when_a_place_is_reserved(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: int) -> None:
        raise OSError(errno.ENOSPC, "nothing left")

    monkeypatch.setattr(ranges, "_fallocate", full)
    with pytest.raises(AdapterFileError, match="the same call goes on"):
        merge_files(*inputs, tmp_path / "out")
    assert not [p for p in (tmp_path / "out").iterdir() if p.name != JOURNAL_NAME]
    monkeypatch.undo()
    merge_files(*inputs, tmp_path / "out")


@pytest.mark.slow
def test_killed_at_random_ten_times(tmp_path: Path) -> None:
    base = save_base(tiny_llama(layers=24, hidden_size=256, intermediate_size=704), tmp_path, "2MB")
    adapter = save_adapter(base, tmp_path, task_type="CAUSAL_LM")
    begin = time.monotonic()
    expected = merge_files(base, adapter, tmp_path / "expected")
    whole = time.monotonic() - begin
    chance, kills, part = random.Random(0), 0, tmp_path / "out0"
    for turn in range(100):
        if kills == 10:
            break
        part = tmp_path / f"out{turn // 4}"  # a few kills each, so that all ten fall before the end
        child = os.fork()
        if child == 0:
            try:
                merge_files(base, adapter, part)  # refused where the kills before came after the end
            finally:
                os._exit(0)
        time.sleep(chance.random() * whole * 0.9)
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if turn % 4 == 3 or kills == 10:
            if not (part / "config.json").exists() or (part / JOURNAL_NAME).exists():
                merge_files(base, adapter, part)
            files = {p.name: p.read_bytes() for p in part.iterdir()}
            assert sorted(files) == sorted(p.name for p in expected.iterdir())
            assert files == {p.name: p.read_bytes() for p in expected.iterdir()}
    assert kills == 10


@pytest.mark.slow
def test_a_large_checkpoint_has_the_bits_of_memory_and_takes_little(tmp_path: Path) -> None:
    """1.7 GB of bfloat16 in four files."""
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "examples/benchmarks/stream_merge.py", "--repeats", "1", "--folder", str(tmp_path), "--json",
         str(tmp_path / "table.json")],
        cwd=root, check=True, capture_output=True, text=True,
    )  # fmt: skip
    table = json.loads((tmp_path / "table.json").read_text())
    assert "tensors unlike the in-memory merge's: 0; layout of the base's shards kept: True" in table["notes"][0], (
        result
    )
    memory = next(row["memory"] for row in table["rows"] if row["method"] == "stream")
    assert memory <= 400

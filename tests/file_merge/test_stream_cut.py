"""A merge from file to file that is killed, and goes on; and its memory, which does not grow with the model."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from file_merge.merges import assert_same_bits, save_adapter, save_base, tensors_of
from helpers import ending_at, tiny_llama

from hf_lora import AdapterFileError, merge_files
from hf_lora.file_merge.ranges import copy_range
from hf_lora.safe_io import atomic


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


def cut_off(writes: int, base: Path, adapter: Path, out: Path, **options: Any) -> None:
    """A merge whose process ends at its n-th write to a file, without any clean-up."""
    left, own = [writes], os.pwrite

    def write(*args: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        return own(*args)

    def merge() -> None:
        os.pwrite = write
        merge_files(base, adapter, out, **options)

    assert in_a_child(merge) == 9
    assert not (out / "config.json").exists()


def whole_files(out: Path) -> dict[str, Path]:
    """Name -> the file of an interrupted merge that is complete under its temporary name."""
    return {path.name.split(".safetensors")[0][1:] + ".safetensors": path for path in out.glob(".*.safetensors.*.tmp")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_three_times_and_continued(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    expected = merge_files(base, adapter, tmp_path / "expected")
    out = tmp_path / "out"
    whole: list[set[str]] = []
    for writes in (4, 12, 12):
        cut_off(writes, base, adapter, out)
        whole.append(set(whole_files(out)))
        assert not list(out.glob("[!.]*"))
    assert whole[0] < whole[1] < whole[2] < {p.name for p in base.glob("*.safetensors")}
    kept = {name: path.stat().st_ino for name, path in whole_files(out).items()}
    merge_files(base, adapter, out)
    assert all((out / name).stat().st_ino == place for name, place in kept.items())  # they were not written again
    assert_same_bits(tensors_of(out), tensors_of(expected))
    assert contents(out) == contents(expected)


def test_a_file_that_lost_its_end_is_written_again(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    expected = merge_files(base, adapter, tmp_path / "expected")
    cut_off(20, base, adapter, tmp_path / "out")
    torn = next(iter(whole_files(tmp_path / "out").values()))
    torn.write_bytes(torn.read_bytes()[:-4])
    merge_files(base, adapter, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(expected)


def test_what_is_overwritten_is_whole_until_the_result_is(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed at every moment of the end: the folder holds the old model, or the same call leaves the new one."""
    base, adapter = inputs
    old, new = merge_files(base, adapter, tmp_path / "old"), tmp_path / "new"
    expected = contents(merge_files(base, adapter, new, dtype="float32"))
    changed = []
    for end in range(200):
        out = Path(shutil.copytree(old, tmp_path / f"out {end}"))
        ended = in_a_child(lambda out=out, end=end: ending_at(end, lambda: merge_files(
            base, adapter, out, dtype="float32", overwrite=True, progress=False
        ))) == 0  # fmt: skip
        seen = {name: data for name, data in contents(out).items() if not name.startswith(".")}
        changed.append((out / atomic.JOURNAL_NAME).exists() or seen == expected)
        assert changed[-1] or seen == contents(old)
        if not ended:
            merge_files(base, adapter, out, dtype="float32", overwrite=True)
        assert contents(out) == expected
        shutil.rmtree(out)
        if ended:
            break
    assert ended
    assert changed == sorted(changed)  # the old model, then the new one: one moment decides
    assert changed.count(True) > 4


def test_a_cut_off_merge_of_other_inputs_is_not_mixed_with(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    out = tmp_path / "out"
    cut_off(20, base, adapter, out)
    assert whole_files(out)
    with pytest.raises(AdapterFileError, match="interrupted"):
        merge_files(base, adapter, out, dtype="float32")
    merge_files(base, adapter, out, dtype="float32", overwrite=True)
    assert contents(out) == contents(merge_files(base, adapter, tmp_path / "whole", dtype="float32"))


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
    """As between two file systems: the same bytes, and no position that threads would share."""
    base, adapter = inputs
    expected = merge_files(base, adapter, tmp_path / "expected")

    def refuses(*args: object) -> int:
        raise OSError(errno.EXDEV, "other file systems")

    monkeypatch.setattr(os, "copy_file_range", refuses)
    out = merge_files(base, adapter, tmp_path / "out")
    assert contents(out) == contents(expected)
    (tmp_path / "source").write_bytes(bytes(range(256)))
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("wb") as target:
        copy_range(source.fileno(), 50, target.fileno(), 20, 100)
        assert os.lseek(source.fileno(), 0, os.SEEK_CUR) == os.lseek(target.fileno(), 0, os.SEEK_CUR) == 0
    assert (tmp_path / "target").read_bytes() == bytes(20) + bytes(range(50, 150))


def test_a_full_disk_keeps_the_files_that_are_whole(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """No file may be larger than a limit that the second one exceeds."""
    resource = pytest.importorskip("resource")
    base, adapter = inputs
    out, expected = tmp_path / "out", contents(merge_files(base, adapter, tmp_path / "expected"))
    sizes = [len(expected[name]) for name in sorted(expected) if name.endswith(".safetensors")]
    limit = min(size for size in sizes if size > sizes[0]) - 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(AdapterFileError, match=r"no space is left(.|\n)*repeat the same call"):
            merge_files(base, adapter, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert whole_files(out)
    assert set(out.iterdir()) == set(whole_files(out).values())
    merge_files(base, adapter, out)
    assert contents(out) == expected


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
            if not (part / "config.json").exists() or (part / atomic.JOURNAL_NAME).exists():
                merge_files(base, adapter, part)
            assert contents(part) == contents(expected)
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

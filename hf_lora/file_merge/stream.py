"""Merge an adapter into a model file by file, without loading the model.

The base's safetensors files are read by ranges and written with the same layout. Rows that the adapter changes are
loaded in blocks and folded by the same code as in memory, so the results are bitwise equal; all other bytes are copied
from file to file by the system. The memory needed is that of the adapter and a few blocks, whatever the model's size.

Complete files are kept under temporary names that identify the inputs of the merge, so an interrupted merge resumes
after the last complete file. Once all files are complete, they are renamed together.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..errors import AdapterFileError, ConfigError, Faults, LoraError, MergeError, nearest
from ..files.format import CONFIG_NAME, EXTRAS_NAME, WEIGHTS_NAME, AdapterFile, holds_adapter, read_adapter
from ..safe_io.atomic import (
    JOURNAL_NAME,
    finish_moves,
    is_full,
    no_space,
    replace_together,
    sync_folder,
    temporary_name,
)
from ..safe_io.reading import read_json
from .lazy_model import IN_MEMORY, make_shell
from .plan import Change, Out, OutShard, Plan, make_plan
from .ranges import CHUNK, Checkpoint, bytes_of, copy_range, open_checkpoint, read_into, write_from
from .sidecars import carry_folders, writers_of
from .writer import Sink

MAX_THREADS = 8
"""More threads are not faster, since they wait for the disk cache."""
NO_LAYER = torch.nn.Module()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PART = ".part"
"""Suffix of a file that is not complete yet."""
_Task = tuple[int, Callable[[], None]]
"""The number of bytes written, for the progress bar, and the function that writes them."""


def merge_files(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    untie: bool = False,
    overwrite: bool = False,
    allow_other_base: bool = False,
    progress: bool = True,
) -> Path:
    """Fold an adapter into a model's safetensors files, and write the result as files with the same layout.

    The tensors are bitwise equal to those of `merge_and_unload`. The memory needed is the adapter and a few blocks of
    rows. If the call was interrupted, the same call resumes after the last complete file.

    Args:
        base: the base model's folder.
        adapter: the adapter's folder, written by hf_lora or PEFT.
        out: the folder to write: new, empty, or that of the same merge if it was interrupted.
        dtype: `"float32"`, `"bfloat16"` or `"float16"` for all floating-point tensors, rounded once. Default: each
            tensor keeps its own.
        untie: give an adapted layer that shares its weight with another a separate copy; the config then states that
            nothing is tied.
        overwrite: write into a folder that is not empty. Its files are unchanged until the result is complete.
        allow_other_base: merge into another base than the adapter was trained on.
        progress: show bytes and rate if the output is a terminal.

    Returns:
        The folder.

    Raises:
        ConfigError: `dtype` is not one of the three.
        AdapterFileError: lists what is wrong with the folders and files, or where the adapter does not fit.
        BaseMismatchError: the adapter was trained on another base model.
        MergeError: lists what cannot be folded. Nothing was written.
    """
    call = f"merge_files({str(base)!r}, {str(adapter)!r}, {str(out)!r})"
    check_dtype(dtype)
    folder = Path(out)
    checkpoint, file, mark = _open(Path(base), Path(adapter), folder, dtype, untie, overwrite, call)
    if _is_moving(folder, mark):
        finish_moves(folder)
        return folder
    with closing(checkpoint):
        try:
            shell = make_shell(checkpoint, file, call, allow_other_base)
            plan = make_plan(shell, DTYPES.get(dtype or ""), untie, call)
            _write_all(plan, folder, mark, progress, call)
        except OSError as error:
            full = f" ({no_space(folder)})" if is_full(error) else ""
            raise AdapterFileError(
                f"{call}: stopped{full}: {error}. Complete files are kept; repeat the same call to resume after them."
            ) from error
    return folder


def check_dtype(dtype: str | None) -> None:
    """Refuse an unknown dtype for a merged model.

    Raises:
        ConfigError: lists the known ones.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown{nearest(dtype, DTYPES)}. It is one of {', '.join(DTYPES)}.")


# Before anything is written ------------------------------------------------------------------------------------------


def _open(
    base: Path, adapter: Path, folder: Path, dtype: str | None, untie: bool, overwrite: bool, call: str
) -> tuple[Checkpoint, AdapterFile, str]:
    """Read the headers and the adapter, and check the folders; one error lists all faults."""
    faults, file = Faults(call), None
    checkpoint = _open_base(base, faults)
    try:
        file = read_adapter(adapter)
    except LoraError as error:
        faults.add(str(error))
    mark = "" if faults.found else _mark_of(checkpoint, adapter, dtype, untie)
    _check_folder(folder, checkpoint, adapter, mark, overwrite, faults)
    faults.check(AdapterFileError, f"Nothing was written. A base without safetensors files: {IN_MEMORY}")
    assert file is not None
    return checkpoint, file, mark


def _open_base(base: Path, faults: Faults) -> Checkpoint:
    if not base.is_dir():
        faults.add(f"{base} is not a folder")
        return Checkpoint(base)
    if holds_adapter(base):
        faults.add(
            f"{base} is an adapter. Merge it first (hf-lora merge {base} --out FOLDER) and name FOLDER as the base"
        )
        return Checkpoint(base)
    try:
        if '"quantization_config"' in (base / "config.json").read_text(encoding="utf-8"):
            faults.add(
                f"{base} is quantized. Use the checkpoint from which it was quantized (allow_other_base=True if its "
                "name differs), or load it and dequantize it in memory"
            )
    except (OSError, UnicodeDecodeError) as error:
        faults.add(f"{base} has no readable config.json ({error})")
    return open_checkpoint(base, faults)


def _mark_of(checkpoint: Checkpoint, adapter: Path, dtype: str | None, untie: bool) -> str:
    """A short hash of the inputs and options of the merge."""
    from .. import __version__

    digest = hashlib.sha256(json.dumps([__version__, dtype, untie]).encode())
    for shard in checkpoint.shards:
        digest.update(f"{shard.path.name} {shard.size} {shard.path.stat().st_mtime_ns}".encode() + shard.header)
    for path in (checkpoint.folder / "config.json", *(adapter / n for n in (CONFIG_NAME, WEIGHTS_NAME, EXTRAS_NAME))):
        if path.is_file():
            with path.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def _left_by_merges(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, mark) of the files left by interrupted merges, complete or not."""
    for path in folder.glob(".*"):
        found = re.fullmatch(rf"\..+\.safetensors\.([0-9a-f]{{16}})\.tmp(?:{re.escape(PART)})?", path.name)
        if found:
            yield path, found[1]


def _is_moving(folder: Path, mark: str) -> bool:
    """Whether this merge was interrupted while its files were renamed."""
    moves = read_json(folder, JOURNAL_NAME) if folder.is_dir() else None
    return any(f".{mark}." in str(source) for source in (moves or {}).values())


def _check_folder(
    folder: Path, checkpoint: Checkpoint, adapter: Path, mark: str, overwrite: bool, faults: Faults
) -> None:
    """Check that the result may be written to a folder."""
    if not folder.exists():
        return
    if not folder.is_dir():
        faults.add(f"{folder} is a file: name a folder")
        return
    if folder.resolve() in (checkpoint.folder.resolve(), adapter.resolve()) or (folder / CONFIG_NAME).exists():
        whose = "base" if folder.resolve() == checkpoint.folder.resolve() else "adapter"
        faults.add(f"{folder} is the folder of the {whose}")
        return
    foreign = {p.name for p in folder.glob("[!.]*.safetensors")} - {shard.path.name for shard in checkpoint.shards}
    if foreign and overwrite:
        faults.add(f"{folder} has {', '.join(sorted(foreign)[:3])}, which would mix with the new files")
    marks = {found for _, found in _left_by_merges(folder)}
    if overwrite or mark in marks or _is_moving(folder, mark):
        return
    if marks:
        faults.add(
            f"{folder} has an interrupted merge of other files or options: resume that one, name another folder, or "
            "pass overwrite=True (--overwrite)"
        )
    elif any(folder.iterdir()):
        faults.add(f"{folder} is not empty: name a new folder, or pass overwrite=True (--overwrite)")


def _check_space(plan: Plan, whole: set[str], folder: Path, call: str) -> None:
    """Check the free space. Existing files stay until the new ones are complete, so their space is not free."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    needed = sum(shard.size for shard in plan.shards if shard.name not in whole)
    free = shutil.disk_usage(there).free
    if needed > free:
        raise AdapterFileError(
            f"{call}: {needed / 2**20:,.1f} MiB are needed, but only {free / 2**20:,.1f} MiB are free in {there}. "
            "Nothing was written. Free space, or name a folder on another disk."
        )


# Writing -------------------------------------------------------------------------------------------------------------


def _write_all(plan: Plan, folder: Path, mark: str, progress: bool, call: str) -> None:
    """Write the files that are not complete yet, then rename all together, the config last."""
    temporary = {shard.name: folder / temporary_name(shard.name, mark) for shard in plan.shards}
    whole = {s.name for s in plan.shards if temporary[s.name].is_file() and temporary[s.name].stat().st_size == s.size}
    for path, _ in list(_left_by_merges(folder)):
        if path not in [temporary[name] for name in whole]:
            path.unlink()
    _check_space(plan, whole, folder, call)
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(shard.size for shard in plan.shards)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="Merging", disable=None if progress else True)
    with bar, _one_thread_each() as threads:
        for shard in plan.shards:
            if shard.name in whole:
                bar.update(shard.size)
                continue
            path = temporary[shard.name]
            part = path.with_name(path.name + PART)
            try:
                _write_shard(plan, shard, part, threads, bar.update)
            except MergeError as error:
                raise MergeError(f"{call}: {error}. No model was written. Use the adapter unmerged.") from error
            part.replace(path)
            sync_folder(folder)
    carry_folders(plan, folder)
    finish_moves(folder)
    writers = writers_of(plan)
    for name in (*writers, JOURNAL_NAME):  # left by killed calls
        for left in folder.glob(temporary_name(name, "*")):
            left.unlink()
    replace_together(folder, writers, temporary)


def _write_shard(plan: Plan, shard: OutShard, part: Path, threads: int, report: Callable[[int], object]) -> None:
    """Write one file and sync it to disk."""
    file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        os.ftruncate(file, shard.size)
        write_from(file, shard.header, 0)
        report(len(shard.header))
        sink = Sink(file, {out.name: out.start for out in shard.outs})
        kept = [out for out in shard.outs if out.base is not None]
        made = {out.name: out.size for out in shard.outs if out.base is None}
        _together([(out.size, partial(_carry, plan.shell.checkpoint, out, sink)) for out in kept], threads, report)
        changes = plan.changes_in(shard)
        sizes = [sum(made.get(name, 0) for name in change.storage.targets) for change in changes]
        _together([(n, partial(_apply, c, sink)) for n, c in zip(sizes, changes, strict=True)], threads, report)
        os.fsync(file)
    except BaseException:
        part.unlink()
        raise
    finally:
        os.close(file)


def _together(tasks: Sequence[_Task], threads: int, report: Callable[[int], object]) -> None:
    """Run tasks on several threads. After an error, no further task is started."""
    with ThreadPoolExecutor(threads) as pool:
        for (size, _), _ in zip(tasks, pool.map(lambda task: task[1](), tasks), strict=True):
            report(size)


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """Within, PyTorch uses one thread per task, since blocks are small; yields the number of threads for tasks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(threads, MAX_THREADS)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _apply(change: Change, sink: Sink) -> None:
    """Write the rows of one tensor that belong to the current file."""
    change.storage.sink = sink
    for rows, block in change.blocks():
        try:
            change.storage.write(NO_LAYER, rows, block)
        except MergeError as error:
            raise MergeError(f"{change.name}: {error}") from error
    change.storage.sink = None
    change.storage.forget()


def _carry(checkpoint: Checkpoint, out: Out, sink: Sink) -> None:
    """Copy a tensor of the base; a change may then overwrite some of its rows."""
    base = out.base
    assert base is not None
    source = checkpoint.file_of(base)
    if out.dtype == base.dtype:
        copy_range(source, base.start, sink.file, out.start, out.size)
        return
    count = out.size // out.dtype.itemsize
    step = CHUNK // base.dtype.itemsize
    memory = torch.empty(step, dtype=base.dtype)
    for start in range(0, count, step):
        values = memory[: min(step, count - start)]
        read_into(source, bytes_of(values), base.start + start * base.dtype.itemsize)
        made = values.to(out.dtype)
        if bool((torch.isfinite(values) & ~torch.isfinite(made)).any()):
            raise MergeError(f"{out.name}: a value is too large for {out.dtype}")
        write_from(sink.file, bytes_of(made), out.start + start * out.dtype.itemsize)

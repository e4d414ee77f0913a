"""Merge an adapter into a model file by file, without loading the model.

The base's safetensors files are read by ranges and written anew with the same layout. Rows that the adapter changes
pass through memory in blocks and are folded by the code that folds in memory, so every bit is the same; all other
bytes are copied from file to file by the system. Memory is that of the adapter and of a few blocks, whatever the
model's size.

Each file is written beside its place and moved there when it is whole. A merge that was cut off goes on from the last
file that is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..adapt.merge import merged_rows
from ..errors import AdapterFileError, ConfigError, Faults, LoraError, MergeError, nearest
from ..files.format import CONFIG_NAME, AdapterFile, read_adapter
from ..safe_io.atomic import JOURNAL_NAME as MOVES_NAME
from ..safe_io.atomic import finish_moves, is_full, no_space, replace_together
from .journal import Journal, inputs_of, open_journal
from .lazy_model import IN_MEMORY, make_shell
from .plan import Folded, Out, OutShard, Plan, Put, make_plan
from .ranges import Checkpoint, Entry, bytes_of, open_checkpoint, read_into, reserve
from .sidecars import carry_folders, writers_of
from .writer import CHUNK, Sink, Sources, word_of

MAX_THREADS = 8
"""More write no faster: the disk's cache is what they wait for."""
NO_LAYER = torch.nn.Module()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    """Fold an adapter into a model's safetensors files, and write the result as files of the same layout.

    Every tensor has the bits that `merge_and_unload` gives. Memory: a few blocks of rows beside the adapter. A call
    that was cut off is repeated, and goes on from the last file that is whole.

    Args:
        base: the base model's folder.
        adapter: the adapter's folder, ours or PEFT's.
        out: the folder to write: new, empty, or that of the same merge cut off.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`, in which all floating-point tensors are written, rounded once.
            None keeps each tensor's own.
        untie: give an adapted layer that shares its weight with another its own copy of it; the config then says that
            nothing is tied.
        overwrite: write into a folder that is not empty.
        allow_other_base: merge into another base than the adapter was trained on.
        progress: show bytes and rate, where the output is a terminal.

    Returns:
        The folder.

    Raises:
        ConfigError: `dtype` is none of the three.
        AdapterFileError: lists what is wrong with the folders and files, or where the adapter does not fit.
        BaseMismatchError: the adapter was trained on another base model.
        MergeError: lists what cannot be folded. Nothing was written.
    """
    call = f"merge_files({str(base)!r}, {str(adapter)!r}, {str(out)!r})"
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown{nearest(dtype, DTYPES)}. It is one of {', '.join(DTYPES)}.")
    folder = Path(out)
    file, checkpoint, journal = _open(Path(base), Path(adapter), folder, dtype, untie, overwrite, call)
    with closing(Sources()) as sources, _one_thread_each() as threads:
        try:
            shell = make_shell(checkpoint, file, call, allow_other_base)
            plan = make_plan(shell, sources, DTYPES.get(dtype or ""), untie, call)
            whole = {shard.name for shard in plan.shards if journal.has(shard, sources)}
            _check_space(plan, whole, folder, call)
            folder.mkdir(parents=True, exist_ok=True)
            journal.finished = {name: sums for name, sums in journal.finished.items() if name in whole}
            journal.save()
            with _bar(plan.size, progress) as bar:
                for shard in plan.shards:
                    if shard.name in whole:
                        bar.update(shard.size)
                        continue
                    beside = folder / f".{shard.name}.part"
                    sums = write_shard(plan, shard, beside, sources, bar.update, threads)
                    beside.replace(folder / shard.name)
                    journal.finished[shard.name] = sums
                    journal.save()
            _finish(plan, folder, journal, DTYPES.get(dtype or ""))
        except OSError as error:
            full = f" ({no_space(folder)})" if is_full(error) else ""
            raise AdapterFileError(
                f"{call}: stopped{full}: {error}. What is finished stays; the same call goes on from there."
            ) from error
    return folder


def _finish(plan: Plan, folder: Path, journal: Journal, dtype: torch.dtype | None) -> None:
    """Once all weights are written: the small files, of which the config comes last."""
    carry_folders(plan, folder)
    finish_moves(folder)
    writers = writers_of(plan, dtype)
    ours = tuple(f".{name.lstrip('.')}." for name in (*writers, MOVES_NAME, *(s.name for s in plan.shards)))
    for left in [*folder.glob(".*.part"), *folder.glob(".*.tmp")]:  # of calls that were killed
        if left.name.startswith(ours):
            left.unlink()
    replace_together(folder, writers)
    journal.remove()


def _open(
    base: Path, adapter: Path, folder: Path, dtype: str | None, untie: bool, overwrite: bool, call: str
) -> tuple[AdapterFile, Checkpoint, Journal]:
    """Read the headers and the adapter, and look at the three folders: all that is wrong with them is one error."""
    faults = Faults(call)
    file, checkpoint = None, Checkpoint(base)
    if not base.is_dir():
        faults.add(f"{base} is no folder")
    else:
        checkpoint = open_checkpoint(base, faults)
        if not (base / "config.json").is_file():
            faults.add(f"{base} holds no config.json")
        elif _is_quantized(base):
            faults.add(
                f"{base} is quantised. Take the checkpoint that it was made from (allow_other_base=True if its name "
                "differs), or load it and dequantise it in memory"
            )
    try:
        file = read_adapter(adapter)
    except LoraError as error:
        faults.add(str(error))
    if folder.exists() and not folder.is_dir():
        faults.add(f"{folder} is a file; name a folder")
    elif folder.resolve() in (base.resolve(), adapter.resolve()) or (folder / CONFIG_NAME).exists():
        faults.add(f"{folder} is the {'base' if folder.resolve() == base.resolve() else 'adapter'}'s own folder")
    else:
        foreign = {p.name for p in folder.glob("*.safetensors")} - {shard.path.name for shard in checkpoint.shards}
        if foreign and overwrite:
            faults.add(f"{folder} holds {', '.join(sorted(foreign)[:3])}, which would mix with the files written")
    known = file is not None and checkpoint.shards and (base / "config.json").is_file()
    inputs = inputs_of(checkpoint, adapter, {"dtype": dtype, "untie": untie}) if known else ""
    journal = Journal(folder, inputs)
    if not folder.exists() or (folder.is_dir() and folder.resolve() not in (base.resolve(), adapter.resolve())):
        journal = open_journal(folder, inputs, overwrite, faults)
    faults.check(AdapterFileError, f"Nothing was written. A base without safetensors files: {IN_MEMORY}")
    assert file is not None
    return file, checkpoint, journal


def _is_quantized(base: Path) -> bool:
    try:
        return '"quantization_config"' in (base / "config.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _check_space(plan: Plan, whole: set[str], folder: Path, call: str) -> None:
    """A file that was there before goes when its new one is whole, so nothing of it counts as free."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    needed = sum(shard.size for shard in plan.shards if shard.name not in whole)
    left = sum(p.stat().st_size for p in folder.glob(".*.part")) if folder.is_dir() else 0
    free = shutil.disk_usage(there).free + left
    if needed > free:
        raise AdapterFileError(
            f"{call}: {needed / 2**20:,.1f} MiB are to be written, and {free / 2**20:,.1f} MiB are free in {there}. "
            "Nothing was written. Free space, or name a folder on another disk."
        )


def write_shard(
    plan: Plan, shard: OutShard, beside: Path, sources: Sources, report: Callable[[int], object], threads: int
) -> dict[str, int]:
    """Write one file; the check sums of the tensors in it that are no plain copies."""
    places = {out.name: (out.start, out.end - out.start) for out in shard.outs}
    words = {out.name: word_of(out.shape, out.dtype) for out in shard.outs}
    file = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        reserve(file, shard.size)
        os.pwrite(file, shard.header, 0)
        report(len(shard.header))
        sink = Sink(file, places, words, report)
        copies = [
            partial(sink.copy, sources[s.entry.file], s.entry.start, s.place, s.length) for s in shard.stretches()
        ]
        casts = [
            partial(_cast, sink, sources, out, out.base) for out in shard.outs if out.touched and out.base is not None
        ]
        _together([*casts, *copies], threads)
        _together([partial(_apply, part, sink) for part in _changes(plan, sink)], threads)
        return sink.sums()
    except BaseException:
        beside.unlink()
        raise
    finally:
        os.close(file)


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """Let each thread compute alone, and say how many PyTorch may use: blocks are small, and are shared out whole."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(threads, MAX_THREADS)
    finally:
        torch.set_num_threads(threads)


def _together(calls: Sequence[Callable[[], None]], threads: int) -> None:
    """Run calls on some threads."""
    if threads == 1 or len(calls) < 2:
        for call in calls:
            call()
        return
    with ThreadPoolExecutor(threads) as pool:
        started = [pool.submit(call) for call in calls]
        try:
            for future in started:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _changes(plan: Plan, sink: Sink) -> list[Folded | Put]:
    """What the adapter changes in a file, in the order of its tensors."""
    changes: list[tuple[int, Folded | Put]] = []
    for part in plan.changes:
        starts = [sink.places[key][0] for key in part.storage.targets if key in sink.places]
        if starts:
            changes.append((min(starts), part))
    return [part for _, part in sorted(changes, key=lambda change: change[0])]


@torch.no_grad()
def _apply(part: Folded | Put, sink: Sink) -> None:
    storage = part.storage
    storage.sink = sink
    if isinstance(part, Folded):
        for rows, block in merged_rows(part.fold, reuse=True):
            storage.write(part.fold.site, rows, block)
    else:
        values = part.values.reshape(-1) if part.values.dim() == 0 else part.values
        step = max(1, CHUNK // max(1, values[:1].numel()))
        for start in range(0, len(values), step):
            rows = slice(start, min(start + step, len(values)))
            storage.write(NO_LAYER, rows, values[rows])
    storage.sink = None
    storage.forget()


def _cast(sink: Sink, sources: Sources, out: Out, base: Entry) -> None:
    """Write a tensor of the base in the dtype of the result; a fold may then write over parts of it."""
    step = CHUNK // base.dtype.itemsize
    memory = torch.empty(step, dtype=base.dtype)
    for start in range(0, (base.end - base.start) // base.dtype.itemsize, step):
        at = base.start + start * base.dtype.itemsize
        values = memory[: min(CHUNK, base.end - at) // base.dtype.itemsize]
        read_into(sources[base.file], bytes_of(values), at)
        made = values.to(out.dtype)
        if made.dtype != values.dtype and bool((torch.isfinite(values) & ~torch.isfinite(made)).any()):
            raise MergeError(f"{out.name}: a value is too large for {out.dtype}")
        sink.write(out.name, start * out.dtype.itemsize, bytes_of(made))


def _bar(total: int, progress: bool) -> Any:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    return tqdm(total=total, unit="B", unit_scale=True, desc="Merging", disable=None if progress else True)

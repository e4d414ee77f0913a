"""What a merge from file to file has finished, so that a second call goes on where the first was cut off.

The journal is put down before the first weight is written and taken away when all is done. It names what is merged
with what, and for each finished file the check sums of all tensors in it that are not plain copies of the base's.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Faults
from ..files.format import CONFIG_NAME, EXTRAS_NAME, WEIGHTS_NAME
from ..safe_io.atomic import sync_folder
from .plan import OutShard
from .ranges import Checkpoint, read_into
from .writer import Sources, same_bytes, sum_of, word_of

JOURNAL_NAME = ".hf_lora_merge.json"


@dataclass
class Journal:
    """Files that are finished: name -> tensor -> check sum. `inputs` says of which merge."""

    folder: Path
    inputs: str
    finished: dict[str, dict[str, int]] = field(default_factory=dict)

    def save(self) -> None:
        """Write it beside its place, and move it there when it is on the disk."""
        beside = self.folder / f"{JOURNAL_NAME}.tmp"
        with beside.open("w", encoding="utf-8") as file:
            json.dump({"inputs": self.inputs, "finished": self.finished}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.folder / JOURNAL_NAME)

    def remove(self) -> None:
        (self.folder / JOURNAL_NAME).unlink()
        sync_folder(self.folder)

    def has(self, shard: OutShard, sources: Sources) -> bool:
        """Whether a file is whole: its header, every tensor that was written, and every copy against the base's bytes.

        A file may be named as finished and not be: what was written last can be lost when the power goes.
        """
        sums = self.finished.get(shard.name)
        path = self.folder / shard.name
        if sums is None or not path.is_file() or path.stat().st_size != shard.size:
            return False
        touched = {out.name: out for out in shard.outs if out.touched or out.base is None}
        if touched.keys() != sums.keys():
            return False
        file = os.open(path, os.O_RDONLY)
        try:
            header = memoryview(bytearray(len(shard.header)))
            read_into(file, header, 0)
            return (
                header == shard.header
                and all(
                    sum_of(file, o.start, o.end - o.start, word_of(o.shape, o.dtype)) == sums[n]
                    for n, o in touched.items()
                )
                and all(
                    same_bytes(file, s.place, sources[s.entry.file], s.entry.start, s.length)
                    for s in shard.stretches()
                )
            )
        finally:
            os.close(file)


def inputs_of(checkpoint: Checkpoint, adapter: Path, options: dict[str, Any]) -> str:
    """One name for what is merged with what, and how."""
    from .. import __version__

    digest = hashlib.sha256(json.dumps([__version__, options], sort_keys=True).encode())
    for shard in checkpoint.shards:
        digest.update(f"{shard.path.name} {shard.size} {shard.path.stat().st_mtime_ns}".encode())
        digest.update(shard.header)
    digest.update((checkpoint.folder / "config.json").read_bytes())
    for name in (CONFIG_NAME, WEIGHTS_NAME, EXTRAS_NAME):
        digest.update(_digest(adapter / name))
    return digest.hexdigest()


def _digest(file: Path) -> bytes:
    if not file.is_file():
        return hashlib.sha256().digest()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def open_journal(folder: Path, inputs: str, overwrite: bool, faults: Faults) -> Journal:
    """The journal of the folder to write, new or of an earlier call; a fault where the folder holds anything else."""
    journal = Journal(folder, inputs)
    file = folder / JOURNAL_NAME
    if file.is_file():
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            if held["inputs"] == inputs:
                journal.finished = dict(held["finished"])
                return journal
        except (ValueError, KeyError, TypeError):
            pass
        if not overwrite:
            faults.add(
                f"{folder} holds a merge of other files or options that was cut off: go on with that one, "
                "name another folder, or pass overwrite=True (--overwrite)"
            )
    elif folder.is_dir() and any(folder.iterdir()) and not overwrite:
        faults.add(f"{folder} is not empty: name a new folder, or pass overwrite=True (--overwrite)")
    return journal

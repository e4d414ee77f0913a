"""Run by test_run_faults.py: training runs that are killed at chosen moments, resumed, and compared.

Everything is imported once; each run is a fork of this process, so it starts at once. A run counts its moments (each
training step, and each write, move, sync and deletion of files, before, within and after it). A killed run kills
itself with SIGKILL at one of them. What is printed at the end is a JSON list of what happened.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import texts, tiny_llama

import hf_lora.files.format as file_format
from hf_lora import LoraTrainer, LoraTrainingArguments
from hf_lora.files.format import WEIGHTS_NAME
from hf_lora.train.checkpoint.manifest import last_checkpoint, why_incomplete

EVERY = 4
real_save = torch.save


class Moments:
    """Counts the moments of a run, and ends it at one of them."""

    def __init__(self, end: int | None) -> None:
        self.end, self.kinds = end, []

    def pass_by(self, kind: str) -> None:
        if len(self.kinds) == self.end:
            os.kill(os.getpid(), signal.SIGKILL)
        self.kinds.append(kind)

    def halfway(self, kind: str, spoil: Callable[[], None]) -> None:
        """A moment within a write: where the run ends here, half of it is on the disk."""
        if len(self.kinds) == self.end:
            spoil()
        self.pass_by(kind)

    def watch(self) -> None:
        remove, save_file = shutil.rmtree, file_format.save_file

        def around(owner: Any, name: str) -> None:
            own = getattr(owner, name)

            def watched(*args: Any, **kwargs: Any) -> Any:
                self.pass_by(name)
                result = own(*args, **kwargs)
                self.pass_by(name)
                return result

            setattr(owner, name, watched)

        def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            whole = io.BytesIO()
            real_save(value, whole, *args, **kwargs)
            half = whole.getvalue()[: len(whole.getvalue()) // 2]
            self.halfway("torch.save", lambda: Path(path).write_bytes(half) and None)
            real_save(value, path, *args, **kwargs)
            self.pass_by("torch.save")

        def save_tensors(tensors: Any, path: Any, **kwargs: Any) -> None:
            self.halfway("save_file", lambda: Path(path).write_bytes(b"\x40" * 100) and None)
            save_file(tensors, path, **kwargs)
            self.pass_by("save_file")

        def remove_tree(path: Any, *args: Any, **kwargs: Any) -> None:
            inside = sorted(p for p in Path(path).rglob("*") if p.is_file())
            self.halfway("rmtree", lambda: [p.unlink() for p in inside[len(inside) // 2 :]] and None)
            remove(path, *args, **kwargs)
            self.pass_by("rmtree")

        around(os, "replace")
        around(os, "rename")
        around(os, "fsync")
        around(LoraTrainer, "training_step")
        torch.save, shutil.rmtree, file_format.save_file = save, remove_tree, save_tensors


def train(
    folder: Path, steps: int, rank: int, world: int, port: int, end: int | None, settings: dict[str, Any]
) -> None:
    """One run of one process, from the newest complete checkpoint on."""
    torch.set_num_threads(1)
    spoilt = settings.pop("spoilt", None)
    if world > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in place.items()}
    args = LoraTrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=steps,
        save_strategy="steps", save_steps=EVERY, save_total_limit=2, logging_steps=5, learning_rate=1e-2,
        per_device_train_batch_size=4 // world, lora_dropout=0.1, weight_decay=0.1, lr_scheduler_type="cosine",
        warmup_steps=3, **settings,
    )  # fmt: skip
    trainer = LoraTrainer(tiny_llama(), args, train_dataset=texts())
    if spoilt is not None and rank == spoilt[0]:
        own = trainer.compute_loss

        def broken(*args: Any, **kwargs: Any) -> Any:
            loss = own(*args, **kwargs)
            return loss * float("nan") if trainer.state.global_step + 1 == spoilt[1] else loss

        trainer.compute_loss = broken
    if settings.get("enable_jit_checkpoint"):
        for callback in trainer.callback_handler.callbacks:
            if getattr(callback, "jit_manager", None) is not None:
                callback.jit_manager.kill_wait = 0.02 + 0.05 * rank
    step = trainer.training_step

    def slow(*args: Any, **kwargs: Any) -> Any:
        (folder / f"step{rank}").write_text(str(trainer.state.global_step))
        time.sleep(0.03)
        return step(*args, **kwargs)

    if settings.get("enable_jit_checkpoint"):
        trainer.training_step = slow
    moments = Moments(end)
    moments.watch()
    start = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=start)
    done = {"start": start, "kinds": moments.kinds, "skipped": trainer.finite.skipped}
    (folder / f"done{rank}.json").write_text(json.dumps(done))


def start(folder: Path, steps: int, world: int, end: tuple[int, int] | None = None, **settings: Any) -> dict[int, int]:
    """Fork the processes of a run; pid -> rank. `end` is the rank that is killed, and its moment."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = 1
            try:
                train(folder, steps, rank, world, port, end[1] if end and end[0] == rank else None, settings)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        found[pid] = rank
    return found


def wait(running: dict[int, int]) -> dict[int, int]:
    """Rank -> exit status of the processes of a run; when one is killed the others are too, as launchers do it."""
    ended: dict[int, int] = {}
    while running:
        pid, status = os.waitpid(-1, 0)
        rank = running.pop(pid, None)
        if rank is not None:
            ended[rank] = os.waitstatus_to_exitcode(status)
            if ended[rank]:
                for other in running:
                    os.kill(other, signal.SIGKILL)
    return ended


def differences(found: Path, expected: Path, steps: int, world: int) -> list[str]:
    """The files of the last checkpoint that differ in a tensor, a number or a byte."""
    last = f"checkpoint-{steps}"
    names = [WEIGHTS_NAME, "optimizer.pt", "scheduler.pt"]
    names += ["rng_state.pth"] if world == 1 else [f"rng_state_{rank}.pth" for rank in range(world)]
    if why_incomplete(found / last, contents=True):
        return why_incomplete(found / last, contents=True)
    same = {name: (found / last / name).read_bytes() == (expected / last / name).read_bytes() for name in names}
    for name in names:
        if not same[name] and not name.endswith("safetensors"):  # a pickle may differ where its content does not
            values = [torch.load(f / last / name, weights_only=False) for f in (found, expected)]
            same[name] = _equal(*values)
    return [name for name, is_same in same.items() if not is_same]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


def kill(home: Path, kills: int, world: int, steps: int, seed: int) -> list[dict[str, Any]]:
    """A whole run, and then `kills` ones that are killed once and resumed: half of them among writes."""
    whole = home / f"whole{world}"
    ended = wait(start(whole, steps, world))
    assert set(ended.values()) == {0}, Path(f"{whole}.log").read_text()
    kinds = [json.loads((whole / f"done{rank}.json").read_text())["kinds"] for rank in range(world)]
    draw, drawn, results = random.Random(seed), set[tuple[int, int]](), list[dict[str, Any]]()
    for i in range(kills):
        rank = draw.randrange(world)
        writes = [n for n, kind in enumerate(kinds[rank]) if kind != "training_step"]
        others = [n for n, kind in enumerate(kinds[rank]) if kind == "training_step"]
        moment = draw.choice([n for n in (others if i % 2 else writes) if (rank, n) not in drawn])
        drawn.add((rank, moment))
        folder = home / f"killed{world}-{i}"
        ended = wait(start(folder, steps, world, (rank, moment)))
        assert ended[rank] == -signal.SIGKILL, Path(f"{folder}.log").read_text()
        again = wait(start(folder, steps, world))
        assert set(again.values()) == {0}, Path(f"{folder}.log").read_text()
        begun = json.loads((folder / "done0.json").read_text())["start"]
        results.append(
            {
                "rank": rank, "moment": moment, "of": len(kinds[rank]), "kind": kinds[rank][moment],
                "step": kinds[rank][:moment].count("training_step") // 2,
                "resumed": int(begun.removesuffix(".replaced").rpartition("-")[2]) if begun else 0,
                "different": differences(folder, whole, steps, world),
            }
        )  # fmt: skip
    return results


def terminate(home: Path, world: int, steps: int) -> dict[str, Any]:
    """A run that gets SIGTERM after some steps, and is resumed; against the whole run that `kill` made."""
    folder = home / f"terminated{world}"
    running = start(folder, steps, world, enable_jit_checkpoint=True)
    passed = folder / f"step{world - 1}"
    deadline = time.monotonic() + 60
    while not (passed.exists() and int(passed.read_text() or 0) >= 5) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in running:
        os.kill(pid, signal.SIGTERM)
    ended = wait(running)
    assert set(ended.values()) == {0}, Path(f"{folder}.log").read_text()
    stopped = last_checkpoint(folder)
    assert stopped is not None
    assert 5 < int(stopped.rpartition("-")[2]) < steps
    again = wait(start(folder, steps, world))
    assert set(again.values()) == {0}, Path(f"{folder}.log").read_text()
    return {
        "stopped": int(stopped.rpartition("-")[2]),
        "resumed": json.loads((folder / "done0.json").read_text())["start"] == stopped,
        "different": differences(folder, home / f"whole{world}", steps, world),
    }


def skip(home: Path, world: int) -> list[list[int]]:
    """The steps that each process skipped, where the last one alone has a loss that is not finite, at step 3."""
    folder = home / f"skipped{world}"
    ended = wait(start(folder, 6, world, nonfinite="skip", spoilt=(world - 1, 3)))
    assert set(ended.values()) == {0}, Path(f"{folder}.log").read_text()
    return [json.loads((folder / f"done{rank}.json").read_text())["skipped"] for rank in range(world)]


def main(home: Path, tasks: list[str]) -> None:
    """Each task is processes:kills:steps:seed:more, where more is "t" for runs that are terminated and that skip."""
    found = []
    for task in tasks:
        *numbers, more = task.split(":")
        world, kills, steps, seed = map(int, numbers)
        # What the runs are compared with has to be moving: a comparison of still tensors would show nothing.
        killed = kill(home, kills, world, steps, seed)
        ends = [home / f"whole{world}" / f"checkpoint-{step}" / WEIGHTS_NAME for step in (steps - EVERY, steps)]
        assert ends[0].read_bytes() != ends[1].read_bytes()
        found.append({"killed": killed})
        if "t" in more:
            found[-1] |= {"terminated": terminate(home, world, steps), "skipped": skip(home, world)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

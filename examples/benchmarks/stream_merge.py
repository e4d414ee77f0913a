"""Merging without loading: `merge_files` compared with `cp` of the same files and PEFT's load, merge and save.

    python examples/benchmarks/stream_merge.py
    python examples/benchmarks/stream_merge.py --layers 4 --repeats 1 --json out/stream_merge.json

A Llama-shaped checkpoint with random weights is written to a temporary folder, in shards, together with an adapter,
and removed afterwards. The files are cached: they were read just before. The methods alternate. The load of the
machine is recorded: if it is shared, threads do not help, and CPU seconds are more meaningful than wall time. Each
peak memory is measured in a separate process, minus that of an idle process that has imported torch. Every tensor
is compared with the in-memory merge.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from common import Table
from load_merge import llama, ours

LIMITS = {"memory": 400.0, "copy": 3.0, "peft": 0.2}
"""MiB above an idle process; time relative to the copy; time relative to PEFT."""


def parse() -> argparse.Namespace:
    parser = checkpoint_arguments(__doc__)
    parser.add_argument("--peak-of", choices=("idle", *METHODS), help=argparse.SUPPRESS)
    return parser.parse_args()


def checkpoint_arguments(description: str | None) -> argparse.ArgumentParser:
    """Options for the size and the folder of the checkpoint."""
    parser = common.arguments(description)
    parser.add_argument("--layers", type=int, default=19, help="19 are 1.7 GB")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=5632)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="working folder; needs five checkpoints of space")
    return parser


def make(folder: Path, options: argparse.Namespace) -> None:
    """A base and an adapter with a random B."""
    model = llama(options.hidden, options.mlp, options.layers, options.hidden // 512 or 1, "cpu", torch.bfloat16)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder / "base", max_shard_size=int(size / options.shards * 1.02))
    model = ours(model, options.rank)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder / "adapter")


# The methods; memory is measured in a separate process for each ------------------------------------------------------


def stream(folder: Path, out: Path) -> None:
    from hf_lora.file_merge.stream import merge_files

    merge_files(folder / "base", folder / "adapter", out, allow_other_base=True, progress=False)


def memory(folder: Path, out: Path) -> None:
    from hf_lora import LoraModel

    model = LoraModel.from_pretrained(
        folder / "adapter", base_model=str(folder / "base"), merge=True, allow_other_base=True
    )
    model.save_pretrained(out, max_shard_size="500MB")


def peft(folder: Path, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(out, max_shard_size="500MB")


def copy(folder: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", str(folder / "base"), str(out)], check=True)


METHODS: dict[str, Callable[[Path, Path], None]] = {"stream": stream, "memory": memory, "peft": peft, "copy": copy}


def peak(method: str, options: argparse.Namespace) -> None:
    """Print the peak memory of this process in MiB after one method."""
    if method != "idle":
        out = Path(tempfile.mkdtemp(dir=options.folder)) / "out"
        METHODS[method](options.folder, out)
        shutil.rmtree(out.parent)
    print("peak", peak_now())


def peak_now() -> float:
    """The largest resident memory of this process so far, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def peak_in(script: str, method: str, folder: Path, options: argparse.Namespace) -> float:
    """The peak memory that a benchmark prints for one method, in a separate process."""
    command = [sys.executable, script, "--folder", str(folder), "--peak-of", method, "--threads", str(options.threads)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(next(line for line in text.splitlines() if line.startswith("peak")).split()[1])


def peak_of(method: str, folder: Path, options: argparse.Namespace) -> float:
    if method == "idle":  # the minimum with torch imported
        code = "import torch; print(open('/proc/self/status').read())"
        text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        return int(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    return peak_in(__file__, method, folder, options)


# The comparison ------------------------------------------------------------------------------------------------------


def layout(folder: Path) -> dict[str, list[str]]:
    """File -> its tensors in order."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        found[path.name] = sorted(header, key=lambda name: header[name]["data_offsets"])
    return found


def differing(one: Path, other: Path) -> list[str]:
    """Names of the tensors that differ in any bit between two folders."""
    from safetensors import safe_open

    def where(folder: Path) -> dict[str, Path]:
        return {name: folder / file for file, names in layout(folder).items() for name in names}

    a, b = where(one), where(other)
    found = sorted(a.keys() ^ b.keys())
    for name in sorted(a.keys() & b.keys()):
        with safe_open(a[name], "pt") as left, safe_open(b[name], "pt") as right:
            x, y = left.get_tensor(name), right.get_tensor(name)
            if x.dtype != y.dtype or not torch.equal(x, y):
                found.append(name)
    return found


def measure(options: argparse.Namespace) -> Table:
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make(folder, options)
        size = sum(p.stat().st_size for p in (folder / "base").glob("*.safetensors"))
        stream(folder, folder / "stream")
        memory(folder, folder / "memory")
        different = differing(folder / "stream", folder / "memory")
        alike = layout(folder / "stream") == layout(folder / "base")
        for method in ("stream", "memory"):
            shutil.rmtree(folder / method)
        times: dict[str, list[float]] = {method: [] for method in ("copy", "stream", "peft")}
        cpu: dict[str, list[float]] = {method: [] for method in times}
        for _ in range(options.repeats):
            for method in times:
                start, worked = time.perf_counter(), sum(os.times()[:4])
                METHODS[method](folder, folder / "out")
                times[method].append(time.perf_counter() - start)
                cpu[method].append(sum(os.times()[:4]) - worked)
                shutil.rmtree(folder / "out")
        load = os.getloadavg()[0]
        idle = peak_of("idle", folder, options)
        peaks = {method: peak_of(method, folder, options) - idle for method in ("stream", "peft")}
    medians = {method: statistics.median(seconds) for method, seconds in times.items()}
    rows: list[dict[str, Any]] = [
        {
            "method": method,
            "seconds": medians[method],
            "copies": medians[method] / medians["copy"],
            "peft": medians[method] / medians["peft"],
            "cpu": statistics.median(cpu[method]),
            "memory": peaks.get(method),
        }
        for method in medians
    ]
    return Table(
        kind="stream_merge",
        title=f"Merge of {size / 1e9:.2f} GB in {options.shards} shards, bfloat16, r={options.rank}",
        columns={
            "method": "method", "seconds": "seconds", "copies": "times cp", "peft": "times PEFT", "cpu": "CPU seconds",
            "memory": "MiB above idle torch",
        },
        rows=rows,
        settings=common.settings_of(options) | {"peak_of": None},
        notes=[
            f"tensors unlike the in-memory merge's: {len(different)}; layout of the base's shards kept: {alike}",
            f"load {load:.1f} on {os.cpu_count()} cores; medians of {options.repeats}",
            f"limits: {LIMITS['memory']:.0f} MiB, {LIMITS['copy']:.0f} times cp, {LIMITS['peft']} of PEFT",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    asked = parse()
    if asked.peak_of:
        torch.set_num_threads(asked.threads)
        peak(asked.peak_of, asked)
    else:
        common.device_of(asked)
        measure(asked).show(asked.json)

"""Shared code of the benchmarks: alternating calls in one process, exact counts, and tables, printed and as JSON.

Every figure is a ratio to something measured in the same process in the same minutes. A second on one machine says
little about another; the ratio of two things that took turns on it says much.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# The command line ----------------------------------------------------------------------------------------------------


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", choices=("cpu", "h200"), default="cpu", help="sizes for a CPU or for one large GPU"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of PyTorch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
    return parser


def device_of(options: argparse.Namespace) -> torch.device:
    """The device of the preset; sets the number of threads, and disables log output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    if options.preset == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("--preset h200 needs a CUDA device, and PyTorch sees none. Try --preset cpu.")
    return torch.device("cuda")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON values, without the output file."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "json"}


def keep_memory() -> bool:
    """Make glibc keep freed memory, for all measurements of this process; see docs/performance.md."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    trim_threshold, mmap_max = -1, -4  # as in malloc.h
    return mallopt is not None and bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, -1))


# Time ----------------------------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of one variant, in order."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: Times) -> Ratio:
        """Ratio of the medians, and the quartiles of the ratios per round, which show the noise."""
        each = [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]
        low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else (each[0],) * 3
        return Ratio(self.median / other.median, low, high)


@dataclass
class Ratio:
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def take_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 1, warmup: int = 2
) -> dict[str, Times]:
    """Time `calls` alternately; in each round every one is called `repeats` times in a row.

    Each second round goes backwards, so that no call always follows the same other one. The first `warmup` rounds
    do not count.
    """
    times = {name: Times() for name in calls}
    for turn in range(warmup + rounds):
        for name in calls if turn % 2 == 0 else reversed(list(calls)):
            for _ in range(repeats):
                synchronize()
                start = time.perf_counter()
                calls[name]()
                synchronize()
                if turn >= warmup:
                    times[name].seconds.append(time.perf_counter() - start)
    return times


def synchronize() -> None:
    """Wait for the GPU, if one is used."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def gpu_peak(call: Callable[[], object]) -> float:
    """GiB that a call takes on the GPU at its peak, beside what is there before it, such as weights."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


# Counts --------------------------------------------------------------------------------------------------------------


def saved_bytes(call: Callable[[], Any], weights: Iterable[Tensor]) -> int:
    """Bytes that autograd saves for the backward of `call`, without `weights`; shared memory counts once."""
    not_counted = {w.untyped_storage().data_ptr() for w in weights}
    kept: dict[int, torch.UntypedStorage] = {}  # kept until the end, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in not_counted:
            kept[memory.data_ptr()] = memory
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    total = sum(memory.nbytes() for memory in kept.values())
    del result
    return total


class Operations(TorchDispatchMode):
    """Counts operations that read or write elements of tensors; views and allocations do not count.

    An operation that a library defined in Python counts for what it calls, not for one.
    """

    FREE = ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inner = python_operation(func, args)
        if inner is not None:
            with self:
                return inner(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def python_operation(func: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The Python function behind an operation made with `torch.library.custom_op`; None for all others."""
    if func.namespace in ("aten", "prims", "prim"):
        return None
    from torch._library.custom_ops import OPDEFS

    definition = OPDEFS.get(func._schema.name)
    if definition is None:
        return None
    device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
    functions = definition._backend_fns
    found: Callable[..., Any] = functions.get(device) or functions.get(None) or definition._init_fn
    return found


def count_operations(forward: Callable[[], Tensor]) -> tuple[list[str], list[str]]:
    """Names of the operations of a forward that returns one number, and of its backward."""
    with Operations() as there:
        result = forward()
    with Operations() as back:
        result.backward()
    return there.names, back.names


# Tables --------------------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """One result: printed, written as JSON, and read again by report.py.

    Args:
        kind: the script that made it.
        title: what was measured, in a line.
        columns: the key in each row -> its heading.
        rows: figures by key; a `Ratio` is written with its quartiles.
        settings: what the command asked for.
        notes: lines below the table.
    """

    kind: str
    title: str
    columns: dict[str, str]
    rows: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=lambda: machine())

    def text(self) -> str:
        head = list(self.columns.values())
        body = [[shown(row.get(key)) for key in self.columns] for row in self.rows]
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in (head, *body)
        ]
        return "\n".join([self.title, describe(self.machine), "", *lines, *(["", *self.notes] if self.notes else [])])

    def markdown(self) -> str:
        return markdown(list(self.columns.values()), [[shown(row.get(k)) for k in self.columns] for row in self.rows])

    def show(self, file: Path | None) -> None:
        """Print it, and write it where a file is given."""
        print(f"\n{self.text()}")
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_table(file: Path) -> Table | None:
    """A table that `Table.show` wrote; None for any other file."""
    values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or "kind" not in values:
        return None
    quartiles = {"value", "low", "high"}
    for row in values["rows"]:
        row.update({k: Ratio(**v) for k, v in row.items() if isinstance(v, dict) and v.keys() == quartiles})
    return Table(**values)


def shown(value: Any) -> str:
    """A number as the tables show it."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> dict[str, Any]:
    """Everything that the numbers depend on except the code."""
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else processor()
    found: dict[str, Any] = {"device": device, "threads": torch.get_num_threads()}
    for package in ("torch", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def describe(found: Mapping[str, Any]) -> str:
    """One line about a machine."""
    threads = f"{found['threads']} thread{'s' * (found['threads'] != 1)}"
    packages = ", ".join(f"{p} {found[p]}" for p in ("torch", "transformers", "peft") if found.get(p))
    return f"{found['device']}, {threads}; {packages}"

"""Merging at load: `LoraModel.from_pretrained(…, merge=True)` compared with loading the base, and with PEFT.

    python examples/benchmarks/merge_on_load.py
    python examples/benchmarks/merge_on_load.py --layers 4 --repeats 1 --json out/merge_on_load.json

The checkpoint is that of stream_merge.py: Llama-shaped, random, bfloat16. The files are cached, the methods alternate,
and each peak of memory is measured in a separate process after it has read every weight once: transformers maps files,
and unread parts take no memory.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from common import Table
from stream_merge import checkpoint_arguments, make, peak_in, peak_now

LIMITS = {"memory": 64.0, "peft": 0.25}
"""MiB above loading only the base; relative to PEFT."""


def parse() -> argparse.Namespace:
    parser = checkpoint_arguments(__doc__)
    parser.add_argument("--peak-of", choices=tuple(METHODS), help=argparse.SUPPRESS)
    return parser.parse_args()


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "base")


def merged(folder: Path) -> Any:
    from hf_lora import LoraModel

    base = str(folder / "base")
    return LoraModel.from_pretrained(folder / "adapter", base_model=base, merge=True, allow_other_base=True)


def peft(folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(plain(folder), folder / "adapter").merge_and_unload()


METHODS: dict[str, Callable[[Path], Any]] = {"base alone": plain, "hf_lora": merged, "peft": peft}


def measure(options: argparse.Namespace) -> Table:
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make(folder, options)
        size = sum(p.stat().st_size for p in (folder / "base").glob("*.safetensors"))
        times: dict[str, list[float]] = {method: [] for method in METHODS}
        for turn in range(options.repeats + 1):
            for method, run in METHODS.items():
                start = time.perf_counter()
                model = run(folder)
                if turn:  # the first one warms up
                    times[method].append(time.perf_counter() - start)
                del model
        peaks = {method: peak_in(__file__, method, folder, options) for method in METHODS}
    medians = {method: statistics.median(seconds) for method, seconds in times.items()}
    rows = [
        {
            "method": method,
            "seconds": medians[method],
            "peft": medians[method] / medians["peft"],
            "memory": peaks[method] - peaks["base alone"],
        }
        for method in medians
    ]
    return Table(
        kind="merge_on_load",
        title=f"Merge on load of {size / 1e9:.2f} GB, bfloat16, r={options.rank}",
        columns={
            "method": "method", "seconds": "seconds", "peft": "times PEFT", "memory": "MiB above the base alone",
        },
        rows=rows,
        settings=common.settings_of(options) | {"peak_of": None},
        notes=[f"limits: {LIMITS['memory']:.0f} MiB, {LIMITS['peft']} of PEFT"],
    )  # fmt: skip


if __name__ == "__main__":
    asked = parse()
    if asked.peak_of:
        torch.set_num_threads(asked.threads)
        for parameter in METHODS[asked.peak_of](asked.folder).parameters():
            parameter.detach().view(torch.int16).max()  # without a copy
        print("peak", peak_now())
    else:
        common.device_of(asked)
        measure(asked).show(asked.json)

"""Run the sweep of architectures on tiny random models and write docs/architectures.md.

Run it as `.venv/bin/python docs/make_architectures.py`.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "sweep"), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

INTRODUCTION = """# Architectures

<!-- Written by docs/make_architectures.py: change that, not this. -->

This page is written by `.venv/bin/python docs/make_architectures.py`, which puts a tiny random model of each
architecture through an adapter's whole life; `make test-all` runs the same steps as tests, `make test` a sample of
eight.

{count} architectures, each with three choices of layers: `"all-linear"`; the same and the input embedding (of a
model without one, its first convolution); and every linear layer, `Conv1D`, embedding and convolution that the
model holds. Each time these steps are checked against the plain model: a fresh adapter changes no bit; gradients
reach A and B of every layer that runs, and no frozen weight; both kinds of activation checkpointing give the same
gradients; `generate`; deepcopy and pickle; saving, and loading onto a fresh base, gives the same bits; merged
equals unmerged to float32 rounding; unmerging and unloading restore every bit and class; the vocabulary is resized
and tied.

Versions: torch {torch}, transformers {transformers}, on CPU.

"""

HEADER = (
    "| architecture | class | all-linear | left out, by reason | every kind | refused, by reason "
    "| steps that the plain model cannot do |\n|---|---|---|---|---|---|---|\n"
)

REASONS = """
The two number columns count adapted layers (the models have two layers where they can). The reasons:

- *weight used by the parent*: the parent multiplies by the layer's weight itself, so the layer's forward, and with
  it the adapter, may never run. `"all-linear"` leaves such a layer out; naming it is an error that
  `allow_bypassed=True` lifts.
- *parametrized weight*: the weight is computed from other tensors at each use, so a merged value would be lost.
- *forward of its own*: a subclass of an embedding or convolution that computes something else than its kind.
- *no linear layer*: the model has none outside its head; name its convolutions.
- *rank not divisible by groups*: PEFT's form of a grouped convolution's factors needs a rank that is;
  `rank_pattern` gives one.
- *grouped convolution*: trains, saves and loads; its update crosses the groups, which no grouped weight can hold,
  so merging is refused.
- *tied weight*: trains, saves and loads; merging is refused because the update would reach the other layer too.
  `untie=True` gives the layer a weight of its own first.
- *embeddings that resizing joins*: several embeddings hold one weight, and resizing the vocabulary makes one
  module of them. Resize before `apply_lora`.

Layers that refuse to be adapted are refused by `apply_lora`, before anything is changed; the last three are
refused by the call that would need them. `target_modules` in the refusals is the third choice, which names every
layer there is.
"""


def main() -> None:
    warnings.filterwarnings("ignore")
    import torch
    import transformers
    from models import CASES
    from steps import TARGETS, sweep

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # faster for models this small
    rows = []
    for case in CASES:
        started, records = time.perf_counter(), {}
        for targets in TARGETS:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                records[targets] = sweep(case, targets, Path(folder))
        rows.append(row(records))
        print(f"{case.name:24} {time.perf_counter() - started:6.2f} s", flush=True)
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    page = INTRODUCTION.format(count=len(CASES), **versions) + HEADER + "\n".join(rows) + "\n" + REASONS
    (ROOT / "docs" / "architectures.md").write_text(page, encoding="utf-8")


def row(records: dict[str, Any]) -> str:
    linear, everything = records["all-linear"], records["everything"]
    skipped = [f"{count} {reason}" for reason, count in sorted(linear.skipped.items())]
    refused = [f"{len(names)} {reason}" for reason, names in everything.refused.items()]
    refused += [reason for reason in linear.refused if reason not in everything.refused]
    cannot = {step: why for record in records.values() for step, why in record.base_cannot.items()}
    cells = (
        f"{linear.case.name} ({linear.case.group})", f"`{linear.model}`", str(linear.adapted), joined(skipped),
        str(everything.adapted), joined(refused), joined(f"{step} ({short(why)})" for step, why in cannot.items()),
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def joined(parts: Iterable[str]) -> str:
    return "; ".join(parts) or "–"


def short(reason: str) -> str:
    """The first words of another library's error, for a table's cell."""
    text = reason.replace("|", "/").replace("<", "").replace(">", "")
    return text if len(text) <= 90 else text[:87] + "…"


if __name__ == "__main__":
    main()

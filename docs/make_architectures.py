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

INTRODUCTION = """---
hide: [toc]
---

# Architectures

<!-- Written by docs/make_architectures.py. Edit that file instead. -->

This page is written by `.venv/bin/python docs/make_architectures.py`, which runs all operations on adapters with a
tiny random model of each architecture. `make test-all` runs the same steps as tests, `make test` runs eight of them.

{count} architectures, each with three choices of layers: `"all-linear"`; the same plus the input embedding (or the
first convolution of a model without one); and every linear layer, `Conv1D`, embedding and convolution of the model.
For each choice these steps are compared with the plain model: a new adapter changes no bit; gradients reach A and B of
every layer that runs, and no frozen weight; both kinds of activation checkpointing give the same gradients;
`generate`; deepcopy and pickle; saving, and loading onto a new base, gives the same bits; the merged model equals the
unmerged one up to float32 rounding; unmerging and unloading restore every bit and class; resizing and tying the
vocabulary.

Versions: torch {torch}, transformers {transformers}, on CPU.

"""

HEADER = (
    "| architecture | class | all-linear | skipped, by reason | all kinds | refused, by reason "
    "| steps not supported by the plain model |\n|---|---|---|---|---|---|---|\n"
)

REASONS = """
The two columns of numbers count adapted layers (the models have two blocks if possible). The reasons:

- *weight used by the parent*: the parent multiplies by the layer's weight directly, so the layer's forward, and with
  it the adapter, may never run. `"all-linear"` skips such a layer; naming it is an error unless
  `allow_bypassed=True`.
- *parametrized weight*: the weight is computed from other tensors at each use, so a merged weight would be lost.
- *forward of its own*: a subclass of an embedding or convolution with another computation.
- *no linear layer*: the model has none outside its head; name its convolutions.
- *rank not divisible by groups*: in PEFT's format, the rank of a grouped convolution must be divisible by its groups;
  set it with `rank_pattern`.
- *embedding that nothing calls*: it only lends its weight to others, as `shared` of T5 does. The error names those
  that are called.
- *grouped convolution*: can be trained, saved and loaded; its update crosses the groups, which a grouped weight cannot
  represent, so merging is refused.
- *tied weight*: can be trained, saved and loaded; merging is refused because the update would change the other layer
  too. `untie=True` first gives the layer its own weight.
- *embeddings that resizing joins*: several embeddings share one weight, and resizing the vocabulary merges them into
  one module. Resize before `apply_lora`.

Layers that cannot be adapted are refused by `apply_lora`, before anything is changed; the last three are refused by
the calls that they affect. `target_modules` in the refusals is the third choice, which names every layer.
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
    skipped = [f"{count}\N{NO-BREAK SPACE}× {reason}" for reason, count in sorted(linear.skipped.items())]
    refused = [f"{len(names)}\N{NO-BREAK SPACE}× {reason}" for reason, names in everything.refused.items()]
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
    return text if len(text) <= 60 else text[:59] + "…"


if __name__ == "__main__":
    main()

"""`--learning-rate auto`: the learning rate by successive halving, on a held-out part of the training rows.

Five rates around the default train for an eighth of the run's steps each, the best two of them for a quarter, each
with a whole schedule (Karnin et al. 2013; Jamieson and Talwalkar 2016, arXiv:1502.07943). All use one base in memory,
whose adapter and head are set back to their start. The search costs about as much as the run itself, which then starts
anew on all rows, as if its rate had been given.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import hashlib
import json
import math
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.utils import logging

from ..errors import ConfigError, TrainingError
from ..layers.distributed import of_all_ranks
from ..safe_io.atomic import replace_together
from ..tasks.base import Data
from .arguments import LoraTrainingArguments
from .build import build_trainer
from .defaults import head_rate
from .initialize import looks_at_batches
from .parsing import Parsed
from .schedule import steps_of
from .template import as_yaml

logger = logging.get_logger(__name__)

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The rates that are tried, as multiples of the default."""
RUNGS = ((8, 5), (4, 2))
"""(divisor of the run's steps, number of rates) of each round."""
SHORTEST = 16
"""Shorter runs are treated as having so many steps, so that each round is longer than the one before."""
HELD_OUT, MOST_HELD_OUT = 10, 1000
"""One of so many rows is held out, and at most so many rows."""
FEWEST_ROWS = 20
FILE = "learning_rates.json"
"""The results, in the output folder, from which an interrupted search goes on."""


@dataclasses.dataclass
class Trial:
    """A rate, and the loss on the held-out rows after so many steps; infinite if the training diverged."""

    rate: float
    steps: int
    loss: float


def search_learning_rate(parsed: Parsed, data: Data) -> list[Trial]:
    """Set the learning rate of a run to the best of five, and describe the search in `data.lines`.

    Returns:
        The trials, in the order in which they ran.

    Raises:
        ConfigError: there are too few rows, LoRA-Muon trains everything, the initialization looks at batches,
            or every rate diverged.
    """
    rows = data.rows["train"]
    if parsed.training.muon_learning_rate is not None and not data.task.has_head:
        raise ConfigError(
            "--learning-rate auto searches for the rate of AdamW, which has nothing to train beside "
            "--muon-learning-rate. Leave one of them out."
        )
    if looks_at_batches(parsed.training.lora_config()):
        raise ConfigError(
            f"--learning-rate auto: --lora-init {parsed.training.lora_init} looks at batches at the start of each "
            "training, and the search starts every rate from one adapter. Pass a number, or another initialization."
        )
    if len(rows) < FEWEST_ROWS:
        raise ConfigError(
            f"--learning-rate auto needs at least {FEWEST_ROWS} rows, because a part of them is held out; there are "
            f"{len(rows)}. Pass a number."
        )
    part, rest, held = _without_held_out(parsed, data)
    store = _Store(Path(str(parsed.training.output_dir), FILE), parsed, data)
    rates = [parsed.training.learning_rate * factor for factor in FACTORS]
    trials: list[Trial] = []
    with contextlib.ExitStack() as stack:
        hidden = parsed.training.disable_tqdm or parsed.training.process_index > 0
        bar = stack.enter_context(logging.tqdm(total=sum(count for _, count in RUNGS), desc="rates", disable=hidden))
        runner: _Runner | None = None
        for divisor, count in RUNGS:
            rung = []
            for rate in rates[:count]:
                found = store.find(rate, divisor)
                if found is None:
                    runner = runner or stack.enter_context(_Runner(part, rest, held))
                    found = store.add(runner.run(rate, divisor), divisor, runner.is_main)
                rung.append(found)
                bar.update(1)
            trials += rung
            rates = [trial.rate for trial in sorted(rung, key=lambda trial: trial.loss)]
    best = min(trials[-RUNGS[-1][1] :], key=lambda trial: trial.loss)
    if not math.isfinite(best.loss):
        raise ConfigError("--learning-rate auto: the training diverged with every rate that was tried. Pass a number.")
    _set_rate(parsed.training, best.rate, parsed.given)
    data.lines.append(describe(trials, best))
    return trials


def describe(trials: Sequence[Trial], best: Trial) -> str:
    """The curve of a search, for the user."""
    lines = [f"learning rate {best.rate:g}, by the loss on held-out rows:"]
    for steps in dict.fromkeys(trial.steps for trial in trials):
        row = sorted((t for t in trials if t.steps == steps), key=lambda trial: trial.rate)
        values = ", ".join(f"{t.rate:g}: {_loss(t)}" for t in row)
        lines.append(f"  after {steps:,} steps  {values}")
    if best.rate in (min(t.rate for t in trials), max(t.rate for t in trials)):
        lines.append("  It is at the end of the range: a rate beyond it may be better. --learning-rate sets one.")
    return "\n".join(lines)


def _loss(trial: Trial) -> str:
    return f"{trial.loss:.3f}" if math.isfinite(trial.loss) else "diverged"


def _set_rate(training: LoraTrainingArguments, rate: float, given: Container[str]) -> None:
    """Set the learning rate, and that of a head as a run with this rate would, if it is not `given`."""
    training.learning_rate = rate
    if training.head_learning_rate is not None and "head_learning_rate" not in given:
        training.head_learning_rate = head_rate(rate)


class _Runner:
    """One model in memory, trained again and again from the same start."""

    def __init__(self, parsed: Parsed, data: Data, held: Any) -> None:
        self._parsed, self._data, self._held = parsed, data, held
        self._trainer: Any = None

    def __enter__(self) -> _Runner:
        self._trainer = build_trainer(self._parsed, self._data)
        for shown in (ProgressCallback, PrinterCallback):
            self._trainer.remove_callback(shown)
        model: nn.Module = self._trainer.model
        self._start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self._steps = steps_of(self._trainer) or 0
        self.is_main = bool(self._trainer.is_world_process_zero())
        return self

    def __exit__(self, *_: object) -> None:
        self._trainer = None
        gc.collect()

    def run(self, rate: float, divisor: int) -> Trial:
        """Train from the start for a part of the run's steps, and evaluate."""
        trainer = self._trainer
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if name in self._start:
                    parameter.copy_(self._start[name])
        set_seed(trainer.args.seed)  # the same batches and dropout for every rate
        _set_rate(trainer.args, rate, self._parsed.given)
        trainer.args.max_steps = max(SHORTEST, self._steps) // divisor
        trainer.optimizer = trainer.lr_scheduler = None
        loss = math.inf
        try:
            trainer.train()
            loss = float(trainer.evaluate(self._held)["eval_loss"])
        except TrainingError as error:
            logger.info(f"learning rate {rate:g}: {error}")
        return Trial(rate, trainer.args.max_steps, loss if math.isfinite(loss) else math.inf)


class _Store:
    """The trials so far, in a file, for a search that was interrupted."""

    def __init__(self, path: Path, parsed: Parsed, data: Data) -> None:
        self._path = path
        given = {name: value for name, value in yaml.safe_load(as_yaml(parsed)).items() if name not in _NO_MATTER}
        settings = json.dumps([given, parsed.training.learning_rate], sort_keys=True, default=str)
        digest = hashlib.sha256(settings.encode())
        digest.update(data.config.to_json_string().encode())
        rows = data.rows["train"]
        for row in rows.sources() if hasattr(rows, "sources") else rows:
            digest.update(repr(row).encode())
        self._key = digest.hexdigest()[:16]
        try:
            self._held: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")).get(self._key, {})
        except (OSError, ValueError, AttributeError):
            self._held = {}
        self._held = of_all_ranks(self._held)[0]  # the file may be on the first node alone

    def find(self, rate: float, divisor: int) -> Trial | None:
        """A trial of the same search that is finished."""
        found = self._held.get(f"{rate:g}/{divisor}")
        return None if found is None else Trial(rate, int(found["steps"]), float(found["loss"]))

    def add(self, trial: Trial, divisor: int, is_main: bool) -> Trial:
        """Keep a trial."""
        self._held[f"{trial.rate:g}/{divisor}"] = {"steps": trial.steps, "loss": trial.loss}
        if is_main:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({self._key: self._held}, indent=1) + "\n"
            replace_together(self._path.parent, {FILE: lambda file: file.write_text(text, encoding="utf-8")})
        return trial


def _without_held_out(parsed: Parsed, data: Data) -> tuple[Parsed, Data, Any]:
    """The run without evaluations and files, its data without the rows that are held out, and these."""
    rows = data.rows["train"]
    generator = torch.Generator().manual_seed(parsed.training.seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    count = min(max(1, len(rows) // HELD_OUT), MOST_HELD_OUT)
    held, kept = sorted(order[:count]), sorted(order[count:])
    training = copy.copy(parsed.training)
    for name, value in _QUIET.items():
        setattr(training, name, value)
    part = dataclasses.replace(parsed, training=training)
    rest = dataclasses.replace(data, rows={"train": rows.select(kept)}, lines=[])
    return part, rest, rows.select(held)


_NO_MATTER = ("resume_from_checkpoint", "overwrite", "verbose", "output_dir", "test_file", "eval_file")
"""Arguments that have no effect on a trial."""
_QUIET: dict[str, Any] = {
    "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "push_to_hub": False,
    "resume_from_checkpoint": None, "dataloader_drop_last": False,
}  # fmt: skip

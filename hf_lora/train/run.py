"""`finetune`: from text files to a saved adapter. `hf-lora train` runs it."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, set_seed
from transformers.utils import logging

from ..adapt.inner import adapted_part
from ..adapt.report import adapter_table, trainable_parameters
from ..adapt.state import require_state
from ..adapt.walk import adapter_layers
from ..data.chat import show_batch
from ..errors import HubError
from ..tasks.base import Data, Task
from ..tasks.preference import Preference
from ..tasks.registry import CAUSAL_LM
from .build import build_trainer
from .check import checkpoint_of
from .output import continues, files_of_inputs, remove_checkpoints, remove_results, remove_unchanged
from .parsing import Parsed, RunArguments, parse_arguments
from .run_data import read_data
from .schedule import check_batches, hints, set_warmup, steps_of
from .scores import add_scores, scores
from .search import search_learning_rate
from .start import start_lines
from .watch.progress import Progress
from .watch.rise import LossRise
from .watch.slowdown import Slowdown

logger = logging.get_logger(__name__)
SHOWN = 3
"""How many rows or documents `--show-batch` shows."""


@dataclass
class RunResult:
    """The result of `finetune`: the trained model, the final metrics, and the folder of the adapter.

    Args:
        loss: the loss that a language model was trained with; empty for other models.
        pushed: the address of the commit on the Hub; empty without `push_to_hub`.
    """

    model: Any
    metrics: dict[str, float]
    output_dir: Path
    seconds: float
    adapter_bytes: int
    loss: str = ""
    pushed: str = ""
    task: Task | None = None


def finetune(
    arguments: Parsed | Mapping[str, Any] | str | os.PathLike[str], report: Callable[[str], object] | None = None
) -> RunResult:
    """Read the data, adapt the model, train, evaluate, and save adapter, tokenizer and card to `output_dir`.

    Args:
        arguments: the arguments of `hf-lora train` by name, such as `{"model": "bert-base", "train_file": "train.csv",
            "lora_r": 16, "output_dir": "my-adapter"}`; a YAML file of them; or the result of `parse_arguments`.
        report: called once, before the first step, with a text that describes the data and the adapter. Default: log
            it at INFO.

    Raises:
        ConfigError: an argument is missing, or two are in conflict.
        DataError: the data are missing, invalid, or do not fit the task.
        TargetError, TrainingError: see `LoraTrainer`.
    """
    parsed = arguments if isinstance(arguments, Parsed) else parse_arguments([], arguments)
    data = read_data(parsed)
    if parsed.run.search_learning_rate:
        search_learning_rate(parsed, data)
    trainer, training = build_trainer(parsed, data), parsed.training
    add_scores(trainer, data)
    _begin(parsed, data, trainer, report)
    resume = checkpoint_of(parsed)
    if parsed.run.overwrite and not continues(str(training.output_dir), resume) and trainer.is_world_process_zero():
        remove_checkpoints(str(training.output_dir))
    trainer.accelerator.wait_for_everyone()
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - start
    found = {split: _evaluate(trainer, data, split) for split in ("eval", "test") if split in data.rows}
    if parsed.run.overwrite and trainer.is_world_process_zero():
        remove_results(str(training.output_dir))
    trainer.save_state()
    metrics: dict[str, float] = {}
    for split, values in found.items():
        metrics |= values
        if trainer.is_world_process_zero():
            trainer.save_metrics(split, values)
    card = _data_of_card(parsed.run, list(found))
    former = files_of_inputs(str(training.output_dir))
    pushed = ""
    if training.push_to_hub:  # saves, and writes the card, before it pushes
        pushed = _push(trainer, card)
    else:
        trainer.save_model()
        trainer.create_model_card(**card)
    if parsed.run.overwrite and trainer.is_world_process_zero():
        remove_unchanged(former)
    out = Path(str(training.output_dir))
    size = sum(f.stat().st_size for f in out.glob("adapter_*"))
    return RunResult(trainer.model, metrics, out, seconds, size, trainer.head_loss.line(), pushed, data.task)


def _evaluate(trainer: Any, data: Data, split: str) -> dict[str, float]:
    """The metrics of the trained model on a split, with those of generated texts if the task has them."""
    if data.task.metrics_of_rows:
        trainer.compute_metrics = data.task.compute_metrics(data, split)
    values: dict[str, float] = trainer.evaluate(data.rows[split], metric_key_prefix=split)
    if isinstance(data.task, Preference):  # whose trainers only log their metrics, and always as those of eval
        logged = trainer.state.log_history[-1]
        values |= {f"eval_{name}": logged[f"eval_{name}"] for name in data.task.metrics if f"eval_{name}" in logged}
        values = {
            f"{split}_{name.removeprefix('eval_')}" if name.startswith("eval_") else name: value
            for name, value in values.items()
        }
    if data.task.scored:
        values |= scores(trainer, data, split, split)
    return values


def _push(trainer: Any, card: Mapping[str, Any]) -> str:
    """Save and push the adapter with its card; the address of the commit.

    Raises:
        HubError: it is saved, and was not pushed; the message has the command that pushes it.
    """
    try:
        done = trainer.push_to_hub(**card)
    except HubError as error:
        words = shlex.join(["hf-lora", "push", str(trainer.args.output_dir), str(trainer.hub_model_id)])
        raise HubError(f"{error}\nThe adapter is trained and saved. Push it with: {words}") from error
    return str(done.commit_url) if done is not None else ""


def _begin(parsed: Parsed, data: Data, trainer: Any, report: Callable[[str], object] | None) -> None:
    """Set the warm-up, add the watches, and report what the run trains."""
    steps = steps_of(trainer)
    check_batches(trainer)
    set_warmup(trainer.args, steps, parsed.given)
    for watch in (LossRise(), Slowdown()):
        trainer.add_callback(watch)
    if trainer.callback_handler.pop_callback(ProgressCallback) is not None:  # none without a progress bar
        trainer.add_callback(Progress(*_size(data)))
    if trainer.is_world_process_zero():
        model = adapted_part(trainer.model)
        lines = [summary_line(model, data, steps)]
        if report is not None:  # the trainer logs them too
            start = start_lines(model, trainer.accelerator, None, parsed.training)
            lines += start if parsed.run.verbose else start[-1:]
        lines += [adapter_table(model)] if parsed.run.verbose else []
        lines += hints(trainer.args, steps, bool(getattr(trainer.args, "packing", False)))
        (report or logger.info)("\n".join([*data.lines, *lines]))


def summary_line(model: Any, data: Data, steps: int | None) -> str:
    """What a run trains in one line: the data, the adapter, and the steps."""
    trained, total = trainable_parameters(model)
    state = require_state(model, "train")
    name = next(iter(state.activity.active))
    record = state.adapters[name]
    layers = sum(name in layer._lora.names for layer in adapter_layers(model).values())
    method = {"lora": "LoRA", "dora": "DoRA"}.get(record.config.method, record.config.method)
    adapter = f"{method} r={record.config.r} on {layers} layer{'s' * (layers != 1)}"
    adapter += f" and {', '.join(record.heads)}" if record.heads else ""
    rows = f"{len(data.rows['train']):,} rows"
    parts = [f"{data.kind}, {rows}" if data.kind else rows]
    parts.append(f"{adapter}, {trained:,} trained ({100 * trained / max(1, total):.2g}%)")
    parts += [f"{steps:,} step{'s' * (steps > 1)}"] if steps is not None else []
    return " · ".join(parts)


def _size(data: Data) -> tuple[int, str]:
    """What an epoch holds, and its unit, for the speed."""
    rows = data.rows["train"]
    if "input_ids" not in rows[0]:
        return len(rows), "rows"
    ids = rows["input_ids"] if data.length else [row["input_ids"] for row in rows]
    return sum(map(len, ids)), "tokens"


def first_batch(parsed: Parsed) -> str:
    """The first rows of the training as text that shows what is trained."""
    data = read_data(parsed, writes=False)
    if data.task.name != CAUSAL_LM:
        set_seed(parsed.training.seed)  # for random masks
        return "\n".join([*data.lines, data.task.show(data, SHOWN)])
    trainer = build_trainer(parsed, data)
    batch = next(iter(trainer.get_train_dataloader()))
    return "\n".join([*data.lines, show_batch(trainer.processing_class, batch, SHOWN)])


def _data_of_card(run: RunArguments, evaluated: list[str]) -> dict[str, str | None]:
    """Arguments of the card about the data; with two evaluations, their names stand for the data."""
    test = evaluated == ["test"]
    file, split = (run.test_file, run.test_split) if test else (run.eval_file, run.eval_split)
    if len(evaluated) > 1:
        return {"dataset_tags": run.dataset}
    if file:
        return {"dataset": Path(file).name}
    return {"dataset": run.dataset, "dataset_tags": run.dataset, "dataset_args": split} if run.dataset else {}

"""The data of a run: the task, the tokenized rows of each split, and lines that describe them. No weights are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from transformers import PretrainedConfig

from ..data.tables import Table, read_table
from ..files.format import read_adapter
from ..hub.download import local_adapter
from ..pooled.build import chosen_pooling
from ..pooled.pooling import POOLING, Pooling
from ..tasks.base import Data, Given, Options, Task, check_packages
from ..tasks.registry import TASKS, choose_task
from .base_model import read_config, read_processor
from .check import check_run, check_task
from .defaults import choose
from .parsing import Parsed, RunArguments, defaults_of


def read_data(parsed: Parsed, writes: bool = True) -> Data:
    """Check the arguments, read and tokenize the data, and set the defaults that depend on the task and the data.

    Args:
        writes: the run writes to its output folder.

    Raises:
        ConfigError, DataError: see `finetune`.
    """
    data = read_rows(parsed, writes)
    if (chosen := choose(parsed, data)).made:
        data.lines.append(str(chosen))
    return data


def read_rows(parsed: Parsed, writes: bool = True) -> Data:
    """Like `read_data`, without the settings that `choose` makes."""
    run, training = parsed.run, parsed.training
    check_run(parsed, writes)
    config = read_config(str(run.model), run.model_revision)
    tables = _read_tables(run)
    options = Options.of(run)
    task = TASKS[run.task] if run.task else choose_task(tables["train"], options, config)
    for name, value in dataclasses.asdict(defaults_of(task, run.packing)).items():
        if name not in parsed.given and hasattr(training, name):
            setattr(training, name, value)
    if "dataloader_pin_memory" not in parsed.given:
        training.dataloader_pin_memory = torch.accelerator.is_available()  # avoids torch's warning on a CPU
    if not {"eval", "test"} & set(tables):
        training.eval_strategy = "no"
    check_task(parsed, task, config, tables["train"])
    check_packages(task)
    processor = read_processor(str(run.model), run.model_revision, task.processor)
    data = task.read(tables, Given(config, processor, options))
    data.lines += [
        f"--{split}-file is the training file: its metrics say nothing about new rows"
        for split, file in (("eval", run.eval_file), ("test", run.test_file))
        if file and run.train_file and Path(file).exists() and Path(file).samefile(run.train_file)
    ]
    data.pooling, why = pooling_of(parsed, task, config)
    if data.pooling is not None:
        data.lines.append(f"the classifier reads a vector of all tokens: {data.pooling} ({why})")
    return data


def pooling_of(parsed: Parsed, task: Task, config: PretrainedConfig) -> tuple[Pooling | None, str]:
    """The pooling of a run's classifier, and why; None if its class in transformers has its own way.

    Raises:
        ConfigError: --pooling is unknown.
    """
    run, adapter = parsed.run, parsed.training.lora_adapter
    if not task.pools:
        return None, ""
    if run.pooling is None and adapter is not None:
        recorded = read_adapter(local_adapter(adapter)).extras.get(POOLING)
        if recorded is not None:
            return Pooling.from_json(recorded), "as in the adapter"
    why = "--pooling" if run.pooling else "declared by the checkpoint"
    return chosen_pooling(str(run.model), config, run.pooling, revision=run.model_revision), why


def _read_tables(run: RunArguments) -> dict[str, Table]:
    tables = {}
    for split, file, part in (
        ("train", run.train_file, run.train_split),
        ("eval", run.eval_file, run.eval_split),
        ("test", run.test_file, run.test_split),
    ):
        if file:
            tables[split] = read_table(file)
        elif run.dataset and part:
            tables[split] = read_table(run.dataset, config=run.dataset_config, split=part)
    return tables

"""What a run checks before it reads the data and loads the model: names, values, and the output folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path

import torch
from accelerate.utils import DynamoBackend
from transformers import PretrainedConfig
from transformers.integrations.integration_utils import get_available_reporting_integrations

from ..adapt.labels import generates
from ..data.classes import PROBLEM_TYPES, REGRESSION, suggest_columns
from ..data.columns import ANSWERS, CHATS
from ..data.tables import READERS, Table
from ..data.trained import is_prose
from ..errors import ConfigError, DataError, Faults, HubError, nearest
from ..hub.names import check_repository, is_ignored
from ..tasks.base import Options, Task
from ..tasks.masked_lm import MaskedLM
from ..tasks.registry import CAUSAL_LM, TASKS, why_not
from .base_model import check_adapter, check_name
from .output import check_output
from .parsing import Parsed, as_flag
from .quantize import check_quantization, why_not_quantizable

_AT_LEAST: dict[str, float] = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "max_length": 1, "max_target_length": 1, "weight_decay": 0, "max_grad_norm": 0, "warmup_steps": 0, "seed": 0,
    "adam_beta1": 0, "adam_beta2": 0, "adam_epsilon": 0, "neftune_noise_alpha": 0, "dataloader_num_workers": 0,
    "save_total_limit": 1, "label_smoothing_factor": 0,
}  # fmt: skip
"""Option -> its smallest value."""
_BELOW: dict[str, float] = {
    "adam_beta1": 1, "adam_beta2": 1, "label_smoothing_factor": 1, "seed": 2**32, "data_seed": 2**32,
}  # fmt: skip
_POSITIVE = ("learning_rate", "num_train_epochs", "eval_steps", "save_steps", "logging_steps", "beta")
_WITHOUT_EFFECT = {
    "do_train": "the command trains", "do_eval": "--eval-file is evaluated, if it is given",
    "do_predict": "`hf-lora generate` and `eval` do", "label_names": "the task has its own",
}  # fmt: skip
"""Arguments of Trainer that a run does not read -> why."""


def check_run(parsed: Parsed, writes: bool = True) -> None:
    """Check the arguments of a run and, if it `writes`, its output folder.

    Raises:
        ConfigError: lists every fault.
    """
    run, training = parsed.run, parsed.training
    faults = Faults("hf-lora train")
    if run.model is None:
        faults.add("no model: pass --model with a folder or a name on the Hub")
    elif reason := check_name(run.model):
        faults.add(reason)
    if bool(run.train_file) == bool(run.dataset):
        faults.add("pass either --train-file or --dataset")
    for option, file in (("train", run.train_file), ("eval", run.eval_file), ("test", run.test_file)):
        if file and "://" in file:
            faults.add(
                f"--{option}-file {file} is an address: download it, or name a dataset of the Hub with --dataset"
            )
        elif file and Path(file).suffix.lower() in READERS and not Path(file).is_file():
            faults.add(f"--{option}-file {file} {'is a folder' if Path(file).is_dir() else 'does not exist'}")
    for name, value, known in (("task", run.task, TASKS), ("problem-type", run.problem_type, PROBLEM_TYPES)):
        if value is not None and value not in known:
            faults.add(f"--{name} {value} is unknown{nearest(value, known)}; it is one of {', '.join(known)}")
    for file, split in ((run.eval_file, run.eval_split), (run.test_file, run.test_split)):
        if file and split:
            faults.add(f"{file} and the split {split!r} cannot both be evaluated: pass only one")
    if run.model is not None and is_ignored(run.model_revision, run.model):
        faults.add(f"--model-revision {run.model_revision} has no effect, since {run.model} is a folder")
    if training.lora_adapter is not None and (reason := check_adapter(training.lora_adapter)):
        faults.add(reason)
    if "head_init" in parsed.given and training.lora_adapter is not None:
        faults.add("--head-init has no effect with --lora-adapter, which has its head")
    elif "head_init" in parsed.given and run.head_init != "random" and run.problem_type == REGRESSION:
        faults.add(f"--head-init {run.head_init} needs classes, and --problem-type {REGRESSION} has none")
    for option, why in _WITHOUT_EFFECT.items():
        if option in parsed.given:
            faults.add(f"{as_flag(option)} has no effect: {why}")
    _check_push(parsed, faults)
    Options.of(run).check(faults)
    for option in ("dataset_config", "train_split", "eval_split", "test_split"):
        if option in parsed.given and not run.dataset:
            faults.add(f"{as_flag(option)} needs --dataset")
    evaluated = any((run.eval_file, run.eval_split, run.test_file, run.test_split))
    for option in ("eval_strategy", "eval_steps"):
        if option in parsed.given and training.eval_strategy != "no" and not evaluated:
            faults.add(f"{as_flag(option)} needs data to evaluate on: pass --eval-file or --test-file")
    if run.source_prefix is not None and not is_prose(run.source_prefix):
        faults.add("--source-prefix must be a printable text, and not longer than a page")
    if training.load_best_model_at_end and not (run.eval_file or run.eval_split):
        faults.add("--load-best-model-at-end needs separate evaluation data: pass --eval-file (not the test data)")
    _check_values(parsed, faults)
    check_quantization(run, faults)
    if writes:
        check_output(str(training.output_dir), checkpoint_of(parsed), run.overwrite, faults)
    faults.check(ConfigError, "`hf-lora train --help` shows an example.")


def _check_push(parsed: Parsed, faults: Faults) -> None:
    """Whether what the user says about a repository has an effect, and its name is valid."""
    training = parsed.training
    if not training.push_to_hub:
        faults.found += [
            f"{as_flag(name)} needs --push-to-hub"
            for name in ("hub_model_id", "hub_private_repo")
            if name in parsed.given
        ]
    elif training.hub_model_id is not None:
        try:
            check_repository(str(training.hub_model_id), f"--hub-model-id {training.hub_model_id} is")
        except HubError as error:
            faults.add(str(error).rstrip("."))


def checkpoint_of(parsed: Parsed) -> str | bool | None:
    """The checkpoint to resume from: a folder, True for the newest, or None."""
    given = parsed.training.resume_from_checkpoint
    word = str(given).strip().lower()
    return {"none": None, "false": None, "": None, "true": True}.get(word, given)


def check_task(parsed: Parsed, task: Task, config: PretrainedConfig, table: Table) -> None:
    """Check what depends on the task: whether the model has it, and the name of the metric that is best.

    Raises:
        DataError: the columns are those of a language model, and the model is not one.
        ConfigError: the metric is not one that is computed.
    """
    run, training = parsed.run, parsed.training
    if task.name == CAUSAL_LM and run.task is None and not generates(config):
        answers = {*CHATS, *ANSWERS} & set(table.columns)
        what = "chats or prompts with answers" if answers else "no column of labels"
        text, label = (as_word(name) for name in suggest_columns(table))
        columns = f"columns: {', '.join(map(repr, table.columns))}"
        classes = "" if answers else f"To train a classifier, name them: --text-column {text} --label-column {label}. "
        raise DataError(
            f"{table.source} has {what} ({columns}), and --model {run.model} is a {config.model_type} that does not "
            f"generate text. {classes}For a language model, pass another --model; --task {CAUSAL_LM} trains this one "
            f"as it is, --task {MaskedLM.name} on texts with masked words."
        )
    reason = why_not(task, config)
    if reason is not None:
        other = "" if run.task is not None else ", or another --task"
        raise ConfigError(f"hf-lora train: --model {run.model} is {reason}. Pass another --model{other}.")
    reason = why_not_quantizable(run, config)
    if reason is not None:
        raise ConfigError(f"hf-lora train: {reason}.")
    check_options(parsed.given, task)
    if training.per_device_train_batch_size < task.smallest_batch:
        raise ConfigError(
            f"hf-lora train: the task {task.name} needs batches of at least {task.smallest_batch} rows. Pass "
            f"--per-device-train-batch-size {task.smallest_batch}."
        )
    wanted = training.metric_for_best_model
    known = ("loss", *task.metrics_of(Options.of(run), table))
    if wanted is not None and wanted.removeprefix("eval_") not in known:
        raise ConfigError(
            f"hf-lora train: --metric-for-best-model {wanted} is not computed{nearest(wanted, known)}. It is one of "
            f"{', '.join(known)}."
        )


def check_options(given: Collection[str], task: Task) -> None:
    """Refuse options of other tasks.

    Args:
        given: the names of the options that the user set.

    Raises:
        ConfigError: lists them, each with the tasks that it is for.
    """
    faults = Faults("hf-lora train")
    for name in dict.fromkeys(name for other in TASKS.values() for name in other.options):
        if name in given and name not in task.options:
            others = ", ".join(other.name for other in TASKS.values() if name in other.options)
            faults.add(f"{as_flag(name)} has no effect on the task {task.name}; it is for {others}")
    faults.check(ConfigError, "Omit these, or name the task with --task.")


def as_word(name: str) -> str:
    """A column's name as one word of a command line."""
    return name if name.replace("_", "").replace("-", "").isalnum() else f"'{name}'"


def _check_values(parsed: Parsed, faults: Faults) -> None:
    run, training = parsed.run, parsed.training
    values = {f.name: getattr(training, f.name) for f in dataclasses.fields(training)}
    values |= {"max_length": run.max_length, "max_target_length": run.max_target_length, "beta": run.beta}
    for name, value in values.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if not math.isfinite(value):
            faults.add(f"{as_flag(name)} {value} is not a finite number")
        elif name in _POSITIVE and value <= 0:
            faults.add(f"{as_flag(name)} {value:g} must be greater than 0")
        elif value >= _BELOW.get(name, math.inf):
            faults.add(f"{as_flag(name)} {value:g} must be less than {_BELOW[name]:g}")
        elif value < _AT_LEAST.get(name, value):
            faults.add(f"{as_flag(name)} {value:g} must be at least {_AT_LEAST[name]:g}")
    if training.max_steps == 0 or training.max_steps < -1:
        faults.add(f"--max-steps {training.max_steps} must be at least 1 (-1: as many as the epochs take)")
    if run.dtype is not None and not _is_dtype(run.dtype):
        known = ("float32", "bfloat16", "float16")
        faults.add(f"--dtype {run.dtype} is unknown{nearest(run.dtype, known)}; it is {', '.join(known)} or auto")
    if isinstance(training.lr_scheduler_kwargs, str):
        faults.add(f"--lr-scheduler-kwargs {training.lr_scheduler_kwargs} is not a JSON object")
    if training.optim_args and not all("=" in part for part in str(training.optim_args).split(",")):
        faults.add(f"--optim-args {training.optim_args} must have the form name=value,name=value")
    backends, backend = [entry.value.lower() for entry in DynamoBackend], training.torch_compile_backend
    if backend is not None and backend.lower() not in backends:
        faults.add(f"--torch-compile-backend {backend} is unknown{nearest(backend, backends)}")
    if training.torch_compile_mode is not None:
        try:
            torch.compile(torch.nn.Identity(), mode=training.torch_compile_mode)
        except RuntimeError as error:
            faults.add(f"--torch-compile-mode {training.torch_compile_mode}: {str(error).splitlines()[0]}")
    known_loggers = get_available_reporting_integrations()
    for name in training.report_to or ():
        if name not in known_loggers:
            installed = ", ".join(known_loggers) or "none is installed"
            faults.add(
                f"--report-to {name} is not available: install its package (pip install {name}), or choose one that "
                f"is ({installed}), or none"
            )


def _is_dtype(name: str) -> bool:
    found = getattr(torch, name.removeprefix("torch."), None)
    return name == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1)

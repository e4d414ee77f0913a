"""`finetune`: the whole road from files of text to a saved adapter, and the arguments that describe it.

It is what `hf-lora train` runs, and what a script can call: `finetune(*parse_arguments(["--model", …]))`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, set_seed

from ..adapt.heads import find_heads, outside_backbone
from ..adapt.report import adapter_table
from ..errors import ConfigError, Faults, LoraError, nearest
from .arguments import LoraTrainingArguments
from .data import (
    CAUSAL_LM,
    CLASSIFICATION,
    TASKS,
    Columns,
    TokenRows,
    causal_rows,
    choose_columns,
    classification_rows,
    find_labels,
)
from .tables import Table, read_table

LEARNING_RATES = {CLASSIFICATION: 1e-3, CAUSAL_LM: 2e-4}
"""Where none is given. A classifier's model is usually small, and small models want more."""

DEFAULTS: dict[str, Any] = {
    "output_dir": "hf_lora_run",
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.06,  # a fraction of all steps
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "report_to": ["none"],
}
"""Other defaults than Trainer's, whose own suit long runs of large models."""


@dataclass
class RunArguments:
    """What to train on what data; the rest of a run is in `LoraTrainingArguments`."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub name of the base model."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base model."})
    dtype: str | None = field(
        default=None, metadata={"help": "Type of the frozen weights, such as bfloat16. Not given: the checkpoint's."}
    )
    task: str | None = field(
        default=None, metadata={"help": "text-classification or causal-lm. Not given: told by the columns."}
    )
    train_file: str | None = field(default=None, metadata={"help": "CSV, TSV, JSON, JSONL or parquet file."})
    eval_file: str | None = field(default=None, metadata={"help": "File for the evaluations during training."})
    test_file: str | None = field(default=None, metadata={"help": "File for the evaluation at the end."})
    dataset: str | None = field(default=None, metadata={"help": "Name for datasets.load_dataset, in place of files."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_split: str = field(default="train", metadata={"help": "Split of the data set to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split for the evaluations during training."})
    test_split: str | None = field(default=None, metadata={"help": "Split for the evaluation at the end."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the texts, or of the prompts."})
    pair_column: str | None = field(default=None, metadata={"help": "Column of the second text of a pair."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels."})
    completion_column: str | None = field(
        default=None, metadata={"help": "Column of what is learned after the prompt (causal-lm)."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens kept of a text. Not given: at most 512."})


@dataclass
class Parsed:
    """What a command line and its YAML file say."""

    run: RunArguments
    training: LoraTrainingArguments
    given: frozenset[str]
    """Names of the arguments that were given, rather than left at their defaults."""


@dataclass
class RunResult:
    """What `finetune` did: the trained model, the final metrics and where the adapter lies."""

    model: Any
    metrics: dict[str, float]
    output_dir: Path
    seconds: float
    adapter_bytes: int


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"hf-lora train: {message}. `hf-lora train --all-options` lists what each argument takes.")


def argument_parser() -> HfArgumentParser:
    """The parser of `RunArguments` and `LoraTrainingArguments` with the defaults of a run."""
    classes: Any = (RunArguments, LoraTrainingArguments)
    usage = "hf-lora train [--config FILE] [--NAME VALUE ...]"
    parser = _Parser(classes, prog="hf-lora train", usage=usage, allow_abbrev=False, add_help=False)
    parser.set_defaults(**DEFAULTS)
    return parser


def parse_arguments(argv: Sequence[str], config: str | os.PathLike[str] | None = None) -> Parsed:
    """Read flags, on top of a YAML file of the same names.

    Args:
        argv: flags such as `--lora-r 16`; `-` and `_` in a name are the same.
        config: a YAML file with one mapping of names to values.

    Raises:
        ConfigError: a name is unknown (the message has the nearest), or a value cannot be read.
    """
    parser = argument_parser()
    known = {f.name for cls in parser.dataclass_types for f in dataclasses.fields(cls) if f.init}
    known -= {"_n_gpu"}
    values = _read_yaml(config) if config is not None else {}
    faults = Faults(f"hf-lora train --config {config}")
    for name in values:
        if name not in known:
            faults.add(f"{name} is no argument{nearest(name, known)}")
    faults.check(ConfigError, "Correct these lines; `hf-lora train --all-options` lists every argument.")
    empty = {name: value for name, value in values.items() if value == []}  # argparse cannot say it
    parser.set_defaults(**empty)
    lines = [word for name, value in values.items() for word in _as_flag(name, value)]
    try:
        parsed = parser.parse_args_into_dataclasses([*lines, *argv], return_remaining_strings=True)
    except LoraError:
        raise
    except ValueError as error:  # TrainingArguments found two that contradict, or a word that it does not know
        raise ConfigError(f"hf-lora train: {error}") from error
    run, training, rest = parsed[0], parsed[1], parsed[-1]
    faults = Faults("hf-lora train")
    for word in rest:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            faults.add(f"{word} is no argument{_as_flags(nearest(name, known))}")
        elif not faults.found:  # after an unknown name it is that one's value
            faults.add(f"{word} is no argument: names begin with --")
    faults.check(ConfigError, "Correct these; `hf-lora train --all-options` lists every argument.")
    named = {w.lstrip("-").partition("=")[0].replace("-", "_") for w in (*lines, *argv) if w.startswith("--")}
    return Parsed(run, training, frozenset(named | set(empty)))


def _read_yaml(config: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {config} cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {config} is no YAML ({error}).") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config {config} must hold lines of the form `name: value`.")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _as_flag(name: str, value: Any) -> list[str]:
    """A YAML value as words of a command line, so that one parser checks both."""
    if value is None or value == []:
        return []
    if isinstance(value, Mapping):
        return [f"--{name}={json.dumps(value)}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]


def _as_flags(hint: str) -> str:
    return hint.replace("'", "").replace("you mean ", "you mean --").replace(" or ", " or --").replace("_", "-")


def finetune(parsed: Parsed) -> RunResult:
    """Read the data, adapt the model, train, evaluate, and save adapter and tokenizer to `output_dir`.

    Raises:
        ConfigError: an argument is missing, or two contradict.
        DataError: the data are absent, broken, or do not fit the task.
        TargetError, TrainingError: see `LoraTrainer`.
    """
    from transformers import AutoTokenizer

    from .trainer import LoraTrainer

    run, training = parsed.run, parsed.training
    _check(parsed)
    tables = _read_tables(run)
    columns = choose_columns(
        tables["train"], task=run.task, text=run.text_column, pair=run.pair_column, label=run.label_column,
        completion=run.completion_column,
    )  # fmt: skip
    if "learning_rate" not in parsed.given:
        training.learning_rate = LEARNING_RATES[columns.task]
    if "dataloader_pin_memory" not in parsed.given:
        training.dataloader_pin_memory = torch.accelerator.is_available()  # without one, torch warns of it
    tokenizer = AutoTokenizer.from_pretrained(run.model, revision=run.model_revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    labels = find_labels(tables["train"], columns.label) if columns.label else []
    rows = {split: _tokenise(table, columns, labels, tokenizer, run.max_length) for split, table in tables.items()}
    _describe(columns, labels, rows)

    set_seed(training.seed)  # a new head draws random numbers
    model = _load(run, columns, labels, tokenizer)
    if columns.task == CLASSIFICATION and training.lora_modules_to_save is None and not find_heads(model):
        # The checkpoint held a head for as many labels. Nothing says that they are these, so it is trained too.
        training.lora_modules_to_save = outside_backbone(model)
    during = rows.get("eval", rows.get("test"))
    if during is None:
        training.eval_strategy = "no"
    trainer = LoraTrainer(
        model,
        training,
        train_dataset=rows["train"],
        eval_dataset=during,
        processing_class=tokenizer,
        data_collator=_collator(columns, tokenizer),
        compute_metrics=_metrics(columns),
    )
    print(adapter_table(model))
    start = time.perf_counter()
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    seconds = time.perf_counter() - start
    final = rows.get("test", rows.get("eval"))
    prefix = "test" if "test" in rows else "eval"
    metrics = trainer.evaluate(final, metric_key_prefix=prefix) if final is not None else {}
    trainer.save_model()
    trainer.save_state()
    if metrics and trainer.is_world_process_zero():
        trainer.save_metrics(prefix, metrics)
    out = Path(str(training.output_dir))
    size = sum(f.stat().st_size for f in out.glob("adapter_*"))
    return RunResult(model, metrics, out, seconds, size)


def _check(parsed: Parsed) -> None:
    run, training = parsed.run, parsed.training
    faults = Faults("hf-lora train")
    if not run.model:
        faults.add("no model: give --model, a folder or a name on the Hub")
    if bool(run.train_file) == bool(run.dataset):
        faults.add("give either --train-file or --dataset to train on")
    if run.task is not None and run.task not in TASKS:
        faults.add(f"--task {run.task} is unknown{nearest(run.task, TASKS)}; it is {' or '.join(TASKS)}")
    for file, split in ((run.eval_file, run.eval_split), (run.test_file, run.test_split)):
        if file and split:
            faults.add(f"{file} and the split {split!r} cannot both be evaluated: leave one out")
    if training.load_best_model_at_end and not (run.eval_file or run.eval_split):
        faults.add("load_best_model_at_end chooses by data of its own: give --eval-file (not the test data)")
    faults.check(ConfigError, "`hf-lora train --help` shows an example.")


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


def _tokenise(table: Table, columns: Columns, labels: list[str], tokenizer: Any, max_length: int | None) -> TokenRows:
    if columns.task == CLASSIFICATION:
        return classification_rows(table, columns, labels, tokenizer, max_length)
    return causal_rows(table, columns, tokenizer, max_length)


def _describe(columns: Columns, labels: list[str], rows: dict[str, TokenRows]) -> None:
    used = [c for c in (columns.text, columns.pair, columns.label, columns.completion) if c]
    counts = ", ".join(f"{len(r):,} {split}" for split, r in rows.items())
    classes = f", {len(labels)} labels" if labels else ""
    print(f"{columns.task} from the columns {', '.join(map(repr, used))}: {counts}{classes}")
    cut = sum(r.cut for r in rows.values())
    if cut:
        print(f"{cut:,} texts reach the limit of tokens and may have lost their end; --max-length raises it.")


def _load(run: RunArguments, columns: Columns, labels: list[str], tokenizer: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    name = str(run.model)
    common: dict[str, Any] = {"revision": run.model_revision} | ({"dtype": run.dtype} if run.dtype else {})
    if columns.task == CAUSAL_LM:
        return AutoModelForCausalLM.from_pretrained(name, **common)
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
        ignore_mismatched_sizes=True,  # a head for another task is made anew
        **common,
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _collator(columns: Columns, tokenizer: Any) -> Any:
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer) if columns.task == CLASSIFICATION else DataCollatorForSeq2Seq(tokenizer)


def _metrics(columns: Columns) -> Any:
    from .metrics import build_compute_metrics

    return build_compute_metrics(["accuracy", "f1"] if columns.task == CLASSIFICATION else "perplexity")

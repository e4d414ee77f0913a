"""`finetune`: from text files to a saved adapter. `hf-lora train` runs it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from ..adapt.heads import find_heads, outside_backbone
from ..adapt.state import set_trained_format
from ..data import tasks
from ..data.chat import chat_rows, is_templated, show_batch
from ..data.formats import describe, recognize_format
from ..data.tables import Table, read_table
from ..data.tasks import CAUSAL_LM, CLASSIFICATION, TASKS
from ..data.trained import TrainedFormat
from ..errors import ConfigError, Faults, nearest
from .parsing import Parsed, RunArguments, parse_arguments
from .start import start_lines

logger = logging.get_logger(__name__)
LEARNING_RATES = {CLASSIFICATION: 1e-3, CAUSAL_LM: 2e-4}
"""Defaults; classifiers are usually small models, which need a higher rate."""

WINDOW = 1024
"""Default tokens per row of a causal language model, if its context is not shorter."""


@dataclass
class RunResult:
    """The result of `finetune`: the trained model, the final metrics, and the folder of the adapter.

    Args:
        loss: the loss that a language model was trained with; empty for other models.
    """

    model: Any
    metrics: dict[str, float]
    output_dir: Path
    seconds: float
    adapter_bytes: int
    loss: str = ""


@dataclass
class Prepared:
    """A Trainer ready to train, the rows of each split, and lines that describe the data."""

    trainer: Any
    rows: dict[str, Any]
    lines: list[str]


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
    ready = prepare(parsed)
    trainer, training = ready.trainer, parsed.training
    if trainer.is_world_process_zero():
        lines = start_lines(trainer.model, trainer.accelerator, training.optim) if report is not None else []
        (report or logger.info)("\n".join([*ready.lines, *lines]))  # the trainer logs the other lines
    start = time.perf_counter()
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    seconds = time.perf_counter() - start
    found = {
        split: trainer.evaluate(ready.rows[split], metric_key_prefix=split)
        for split in ("eval", "test")
        if split in ready.rows
    }
    trainer.save_state()
    metrics: dict[str, float] = {}
    for split, values in found.items():
        metrics |= values
        if trainer.is_world_process_zero():
            trainer.save_metrics(split, values)
    card = _data_of_card(parsed.run, list(found))
    if training.push_to_hub:  # saves, and writes the card, before it pushes
        trainer.push_to_hub(**card)
    else:
        trainer.save_model()
        trainer.create_model_card(**card)
    out = Path(str(training.output_dir))
    size = sum(f.stat().st_size for f in out.glob("adapter_*"))
    return RunResult(trainer.model, metrics, out, seconds, size, trainer.head_loss.line())


def first_batch(parsed: Parsed) -> str:
    """The first training batch of a causal language model as text that shows which tokens are trained."""
    ready = prepare(parsed)
    batch = next(iter(ready.trainer.get_train_dataloader()))
    if batch["labels"].dim() != 2:
        raise ConfigError("--show-batch is for language models; a classifier is trained on each row's label.")
    return "\n".join([*ready.lines, show_batch(ready.trainer.processing_class, batch)])


def prepare(parsed: Parsed) -> Prepared:
    """Everything before the first step of training."""
    from transformers import AutoTokenizer

    run, training = parsed.run, parsed.training
    _check(parsed)
    tables = _read_tables(run)
    task = run.task or tasks.choose_task(tables["train"], label=run.label_column, completion=run.completion_column)
    if "learning_rate" not in parsed.given:
        training.learning_rate = LEARNING_RATES[task]
    if "dataloader_pin_memory" not in parsed.given:
        training.dataloader_pin_memory = torch.accelerator.is_available()  # avoids torch's warning on a CPU
    if not {"eval", "test"} & set(tables):
        training.eval_strategy = "no"
    tokenizer = AutoTokenizer.from_pretrained(run.model, revision=run.model_revision)
    return (_classifier if task == CLASSIFICATION else _language_model)(parsed, tables, tokenizer)


def _classifier(parsed: Parsed, tables: dict[str, Table], tokenizer: PreTrainedTokenizerBase) -> Prepared:
    from transformers import AutoConfig, AutoModelForSequenceClassification, DataCollatorWithPadding

    from .trainer import LoraTrainer

    run, training = parsed.run, parsed.training
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    columns = tasks.choose_columns(tables["train"], text=run.text_column, pair=run.pair_column, label=run.label_column)
    labels = tasks.find_labels(tables["train"], columns.label)
    settings = AutoConfig.from_pretrained(str(run.model), revision=run.model_revision).get_text_config()
    window = getattr(settings, "max_position_embeddings", None)
    rows = {
        split: tasks.classification_rows(table, columns, labels, tokenizer, run.max_length, window)
        for split, table in tables.items()
    }
    used = ", ".join(repr(c) for c in (columns.text, columns.pair, columns.label) if c)
    counts = ", ".join(f"{len(r):,} {split}" for split, r in rows.items())
    lines = [f"{CLASSIFICATION} from the columns {used}: {counts}, {len(labels)} labels"]
    lines += _truncation(sum(r.cut for r in rows.values()), "texts")

    set_seed(training.seed)  # for the random weights of a new head
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    model = AutoModelForSequenceClassification.from_pretrained(
        str(run.model), num_labels=len(labels), **names, ignore_mismatched_sizes=True, **_loading(run)
    )  # a head for another task is replaced
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if training.lora_modules_to_save is None and not find_heads(model):
        # The checkpoint has a head with this number of labels. They may be other labels, so it is trained too.
        training.lora_modules_to_save = outside_backbone(model)
    trainer = LoraTrainer(
        model, training, DataCollatorWithPadding(tokenizer), **_common(rows, tokenizer, ["accuracy", "f1"])
    )
    limit = tasks.length_limit(tokenizer, run.max_length, window)
    trained = TrainedFormat(
        "classes", columns.text, pair_column=columns.pair, label_column=columns.label, max_length=limit
    )
    set_trained_format(trainer._bare_model, trained)
    return Prepared(trainer, rows, lines)


def _language_model(parsed: Parsed, tables: dict[str, Table], tokenizer: PreTrainedTokenizerBase) -> Prepared:
    try:
        from .sft import LoraSFTConfig, LoraSFTTrainer
    except ImportError as error:
        raise ConfigError(
            f"Training a causal language model requires TRL, which could not be imported ({error}). Run: pip install "
            '"hf_lora[chat]"'
        ) from error
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM

    from .rows import format_of_table

    run, training = parsed.run, parsed.training
    settings = AutoConfig.from_pretrained(str(run.model), revision=run.model_revision).get_text_config()
    length = run.max_length or min(WINDOW, getattr(settings, "max_position_embeddings", None) or WINDOW)
    rows, lines, cut = {}, [], 0
    for split, table in tables.items():
        form = recognize_format(table, run.text_column, run.completion_column)
        templated = is_templated(form, tokenizer, run.use_chat_template)
        lines.append(f"{split}: {describe(form, templated)}")
        if split == "train":
            trained = format_of_table(table, form, templated, length, run.last_turn_only)
        labelled, long = chat_rows(
            table, form, tokenizer, length,
            use_chat_template=run.use_chat_template, last_turn_only=run.last_turn_only,
        )  # fmt: skip
        rows[split] = Dataset.from_dict({key: [row[key] for row in labelled] for key in ("input_ids", "labels")})
        cut += long
    lines += _truncation(cut, "rows")

    # A packed row holds many texts, so one row per device is a sufficient batch.
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if name not in parsed.given:
            setattr(training, name, 1 if run.packing else 8)
    set_seed(training.seed)
    trainer = LoraSFTTrainer(
        AutoModelForCausalLM.from_pretrained(str(run.model), **_loading(run)),
        LoraSFTConfig.of(training, packing=run.packing, max_length=length),
        **_common(rows, tokenizer, ["accuracy", "perplexity"]),
    )
    set_trained_format(trainer._bare_model, trained)
    return Prepared(trainer, rows, lines)


def _common(rows: dict[str, Any], tokenizer: PreTrainedTokenizerBase, metrics: list[str]) -> dict[str, Any]:
    """Arguments that both Trainers take."""
    from ..evaluation.metrics import build_compute_metrics

    evaluated = rows.get("eval", rows.get("test"))
    return {"train_dataset": rows["train"], "eval_dataset": evaluated, "processing_class": tokenizer,
            "compute_metrics": build_compute_metrics(metrics)}  # fmt: skip


def _check(parsed: Parsed) -> None:
    run, training = parsed.run, parsed.training
    faults = Faults("hf-lora train")
    if not run.model:
        faults.add("no model: pass --model with a folder or a name on the Hub")
    if bool(run.train_file) == bool(run.dataset):
        faults.add("pass either --train-file or --dataset")
    if run.task is not None and run.task not in TASKS:
        faults.add(f"--task {run.task} is unknown{nearest(run.task, TASKS)}; it is {' or '.join(TASKS)}")
    for file, split in ((run.eval_file, run.eval_split), (run.test_file, run.test_split)):
        if file and split:
            faults.add(f"{file} and the split {split!r} cannot both be evaluated: pass only one")
    if training.load_best_model_at_end and not (run.eval_file or run.eval_split):
        faults.add("load_best_model_at_end needs separate evaluation data: pass --eval-file (not the test data)")
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


def _data_of_card(run: RunArguments, evaluated: list[str]) -> dict[str, str | None]:
    """Arguments of the card about the data; with two evaluations, their names stand for the data."""
    test = evaluated == ["test"]
    file, split = (run.test_file, run.test_split) if test else (run.eval_file, run.eval_split)
    if len(evaluated) > 1:
        return {"dataset_tags": run.dataset}
    if file:
        return {"dataset": Path(file).name}
    return {"dataset": run.dataset, "dataset_tags": run.dataset, "dataset_args": split} if run.dataset else {}


def _loading(run: RunArguments) -> dict[str, Any]:
    return {"revision": run.model_revision} | ({"dtype": run.dtype} if run.dtype else {})


def _truncation(cut: int, what: str) -> list[str]:
    text = f"{cut:,} {what} reach the token limit and may be truncated; --max-length raises the limit."
    return [text] if cut else []

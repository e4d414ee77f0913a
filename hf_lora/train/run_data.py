"""The data of a run: the task, the tokenized rows of each split, and lines that describe them. No weights are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..data import tasks
from ..data.chat import chat_rows, is_templated
from ..data.formats import describe, recognize_format
from ..data.tables import Table, read_table
from ..data.tasks import CAUSAL_LM, CLASSIFICATION, REGRESSION
from ..data.trained import TrainedFormat
from ..errors import ConfigError
from .base_model import read_base
from .check import check_run, check_task
from .parsing import PACKED, TASK_DEFAULTS, Parsed, RunArguments


@dataclass
class Data:
    """The rows of a run, and what they were made with.

    Args:
        task: one of `TASKS`.
        rows: split -> rows of token ids and labels.
        lines: what the user reads about them.
        labels: the classes; None for a language model, and for numbers.
        length: tokens per row of a language model.
        trained: what the adapter records about its rows.
    """

    task: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    rows: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    labels: list[str] | None = None
    length: int = 0
    trained: TrainedFormat | None = None


def read_data(parsed: Parsed, writes: bool = True) -> Data:
    """Check the arguments, read and tokenize the data, and set the defaults that depend on the task.

    Args:
        writes: the run writes to its output folder.

    Raises:
        ConfigError, DataError: see `finetune`.
    """
    run, training = parsed.run, parsed.training
    check_run(parsed, writes)
    config, tokenizer = read_base(str(run.model), run.model_revision)
    tables = _read_tables(run)
    task = run.task or tasks.choose_task(tables["train"], label=run.label_column, completion=run.completion_column)
    defaults = TASK_DEFAULTS[PACKED if task == CAUSAL_LM and run.packing else task]
    for name in ("learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size"):
        if name not in parsed.given:
            setattr(training, name, defaults[name])
    if "dataloader_pin_memory" not in parsed.given:
        training.dataloader_pin_memory = torch.accelerator.is_available()  # avoids torch's warning on a CPU
    if not {"eval", "test"} & set(tables):
        training.eval_strategy = "no"
    check_task(parsed, task, config, tables["train"])
    data = Data(task, config, tokenizer)
    (_read_classes if task == CLASSIFICATION else _read_answers)(parsed, tables, data)
    return data


def head_settings(data: Data) -> dict[str, Any]:
    """The settings of a head for the classes of the data, or for one number."""
    if data.labels is None:
        return {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": REGRESSION}
    names = dict(enumerate(data.labels))  # which sets num_labels too
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


def _read_classes(parsed: Parsed, tables: dict[str, Table], data: Data) -> None:
    run, tokenizer, train = parsed.run, data.tokenizer, tables["train"]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    columns = tasks.choose_columns(train, text=run.text_column, pair=run.pair_column, label=run.label_column)
    if run.problem_type != REGRESSION:
        data.labels = tasks.find_labels(train, columns.label, run.problem_type)
    window = getattr(data.config.get_text_config(), "max_position_embeddings", None)
    data.rows = {
        split: tasks.classification_rows(table, columns, data.labels, tokenizer, run.max_length, window)
        for split, table in tables.items()
    }
    data.trained = TrainedFormat(
        "classes", columns.text, pair_column=columns.pair, label_column=columns.label,
        max_length=tasks.length_limit(tokenizer, run.max_length, window),
    )  # fmt: skip
    used = ", ".join(repr(c) for c in (columns.text, columns.pair, columns.label) if c)
    counts = ", ".join(f"{len(r):,} {split}" for split, r in data.rows.items())
    kind = "one number each" if data.labels is None else f"{len(data.labels)} labels"
    data.lines = [f"{CLASSIFICATION} from the columns {used}: {counts}, {kind}"]
    data.lines += _truncation(sum(r.cut for r in data.rows.values()), "texts")


def _read_answers(parsed: Parsed, tables: dict[str, Table], data: Data) -> None:
    try:
        from datasets import Dataset
        from trl.trainer.sft_trainer import SFTTrainer  # noqa: F401  needed later
    except ImportError as error:
        raise ConfigError(
            f"Training a causal language model requires TRL, which could not be imported ({error}). Run: pip install "
            '"hf_lora[chat]"'
        ) from error
    from .rows import format_of_table

    run, tokenizer, cut = parsed.run, data.tokenizer, 0
    window = getattr(data.config.get_text_config(), "max_position_embeddings", None)
    limit = TASK_DEFAULTS[CAUSAL_LM]["max_length"]
    data.length = run.max_length or min(limit, window or limit)
    for split, table in tables.items():
        form = recognize_format(table, run.text_column, run.completion_column)
        templated = is_templated(form, tokenizer, run.use_chat_template)
        data.lines.append(f"{split}: {describe(form, templated)}")
        if split == "train":
            data.trained = format_of_table(table, form, templated, data.length, run.last_turn_only)
        labelled, long = chat_rows(
            table, form, tokenizer, data.length,
            use_chat_template=run.use_chat_template, last_turn_only=run.last_turn_only,
        )  # fmt: skip
        data.rows[split] = Dataset.from_dict({key: [row[key] for row in labelled] for key in ("input_ids", "labels")})
        cut += long
    data.lines += _truncation(cut, "rows")


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


def _truncation(cut: int, what: str) -> list[str]:
    text = f"{cut:,} {what} reach the token limit and may be truncated; --max-length raises the limit."
    return [text] if cut else []

"""What a task is: one object, in a file of its own, that training, evaluation and the command line read."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import EvalPrediction, PretrainedConfig

from ..data.chat import marked
from ..data.prompts import AnswerFile
from ..data.tables import Table
from ..data.trained import TrainedFormat
from ..errors import ConfigError, Faults
from ..evaluation.metrics import build_compute_metrics
from ..evaluation.result import Evaluation
from ..generate.texts import evaluating
from ..pooled.pooling import Pooling

Batch = dict[str, Tensor]
Collator = Callable[[list[Any]], Any]
"""Rows -> a batch, as Trainer's `data_collator`."""


@dataclass(frozen=True)
class Options:
    """The options of `hf-lora train` and `eval` that say how rows are read; see `RunArguments`."""

    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    label_columns: Sequence[str] | None = None
    completion_column: str | None = None
    max_length: int | None = None
    max_target_length: int | None = None
    source_prefix: str | None = None
    problem_type: str | None = None
    use_chat_template: bool | None = None
    last_turn_only: bool | None = None

    @classmethod
    def of(cls, source: object) -> Options:
        """The fields of an object with the same names."""
        return cls(**{f.name: getattr(source, f.name) for f in fields(cls)})

    def check(self, faults: Faults) -> None:
        """Add a fault for each column that is named for two things."""
        names = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_column")}
        for name, column in names.items():
            first = next(other for other, same in names.items() if same == column)
            if column is not None and first != name:
                faults.add(f"{first} and {name} are the same column, {column!r}")


@dataclass(frozen=True)
class Given:
    """What rows are read with.

    Args:
        processor: the tokenizer, or the processor of images.
        trained: how the rows of the training of an adapter were read, when it is evaluated.
        known: the labels are those of `config`, as in an evaluation; otherwise those of the first table.
    """

    config: PretrainedConfig
    processor: Any
    options: Options = field(default_factory=Options)
    trained: TrainedFormat | None = None
    known: bool = False

    @property
    def window(self) -> int | None:
        """The number of positions of the model."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def labels(self) -> list[str] | None:
        """The labels of the model that is evaluated, in order."""
        config: Any = self.config
        return [str(config.id2label[i]) for i in range(config.num_labels)] if self.known else None


@dataclass
class Data:
    """The rows of a run, and what they were made with.

    Args:
        rows: split -> rows for the collator.
        lines: what the user reads about them.
        kind: what the labels are, such as `3 labels`; empty without labels.
        labels: the classes; None if the task has none.
        length: tokens per row of a language model.
        trained: what the adapter records about its rows.
        pooling: of a classifier; None if its class in transformers has its own way.
    """

    task: Task
    config: PretrainedConfig
    processor: Any
    rows: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    kind: str = ""
    labels: list[str] | None = None
    length: int = 0
    trained: TrainedFormat | None = None
    pooling: Pooling | None = None


@dataclass(frozen=True)
class Defaults:
    """Options of a run that depend on the task."""

    learning_rate: float
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    max_length: int


@dataclass
class Asked:
    """How a model is evaluated on a file; see `evaluate`."""

    batch_size: int = 8
    generate: bool = False
    system: str | None = None
    max_new_tokens: int | None = None
    file: AnswerFile | None = None
    progress: Callable[[int], None] | None = None

    @property
    def longest(self) -> int:
        """Tokens of a generated answer."""
        return self.max_new_tokens or 256


class Task(ABC):
    """One task. It has no state; everything about a run is in its arguments.

    Attributes:
        name: the value of `--task`.
        kinds: the kinds of `TrainedFormat` that its adapters record.
        auto_class: the class of transformers that loads its models.
        processor: the class that loads what makes inputs of rows.
        metrics: the names of what is computed at evaluations, beside the loss.
        outputs, targets: the outputs of the model that the metrics need, and the columns of labels.
        files: of `hf-lora init`.
        options: the options of a run that have an effect on it and not on all tasks, each with an example.
        packages: the modules that its training imports, each with what to install.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    auto_class: ClassVar[str]
    processor: ClassVar[str] = "AutoTokenizer"
    defaults: ClassVar[Defaults]
    metrics: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]] = ("logits",)
    targets: ClassVar[tuple[str, ...]] = ("labels",)
    files: ClassVar[Mapping[str, str]] = {"train_file": "train.jsonl", "test_file": "test.jsonl"}
    options: ClassVar[Mapping[str, Any]] = {}
    packages: ClassVar[Mapping[str, str]] = {}
    has_system: ClassVar[bool] = False
    """Whether a system message has an effect on `evaluate`."""
    always_generates: ClassVar[bool] = False
    """Whether `evaluate` generates texts without being asked to."""
    has_head: ClassVar[bool] = True
    """Whether its models have a head that is trained for the data, also where the checkpoint has one."""
    commands: ClassVar[bool] = True
    """Whether `hf-lora eval`, or `chat`, uses its adapters."""
    loader: ClassVar[str] = "LoraModel.from_pretrained"
    """What loads its adapters."""
    scored: ClassVar[tuple[str, ...]] = ()
    """The names of metrics that `score` makes, and not Trainer, such as those of generated texts."""
    pools: ClassVar[bool] = False
    """Whether its models classify a vector that is pooled from the tokens, which a checkpoint may declare."""
    starts_at_means: ClassVar[bool] = False
    """Whether a new head can start at the class means: each row has one class."""
    smallest_batch: ClassVar[int] = 1
    """The fewest rows of a batch with which its trainer works."""
    metrics_of_rows: ClassVar[bool] = False
    """Whether `compute_metrics` reads the rows, so that each split has its own."""

    @abstractmethod
    def claims(self, table: Table, options: Options, config: PretrainedConfig) -> bool:
        """Whether the columns of a table are those of this task."""

    @abstractmethod
    def read(self, tables: Mapping[str, Table], given: Given) -> Data:
        """The rows of each split.

        Raises:
            DataError: a column is missing, or cells do not fit; lists every such cell.
        """

    def settings(self, data: Data) -> dict[str, Any]:
        """What the model's config says about the data."""
        if data.labels is None:
            return {}
        names = dict(enumerate(data.labels))  # which sets num_labels too
        return {"id2label": names, "label2id": {name: i for i, name in names.items()}}

    def metrics_of(self, options: Options, table: Table) -> tuple[str, ...]:
        """The metrics of a run; names of `--metric-for-best-model`."""
        return (*self.metrics, *self.scored)

    def show(self, data: Data, count: int) -> str:
        """The first rows of the training as text, in which what is trained has marks."""
        rows = [data.rows["train"][i] for i in range(min(count, len(data.rows["train"])))]
        return "\n".join(f"row {i}: {self.show_row(data, row)}" for i, row in enumerate(rows, 1))

    def show_row(self, data: Data, row: Mapping[str, Any]) -> str:
        """One row as text: its input, then its label."""
        return f"{decoded(data.processor, row['input_ids'])} → {marked(label_of(data, row['labels']))}"

    def collator(self, data: Data) -> Collator:
        """What makes batches of rows, for training and evaluation. Tasks of other libraries' trainers have none."""
        raise NotImplementedError

    def compute_metrics(self, data: Data, split: str) -> Any:
        """The `compute_metrics` of Trainer for one split."""
        return build_compute_metrics(list(self.metrics), shift_labels=False)

    def score(self, model: Any, data: Data, split: str, asked: Asked) -> Evaluation:
        """The metrics of a model on the rows of one split, without a Trainer."""
        rows, collate, compute = data.rows[split], self.collator(data), self.compute_metrics(data, split)
        size = asked.batch_size if getattr(data.processor, "pad_token", "") is not None else 1
        return Evaluation(score_batches(model, rows, collate, compute, size, self.outputs, self.targets))

    def evaluate(self, model: Any, table: Table, given: Given, asked: Asked) -> Evaluation:
        """The metrics of a model on a table, see `hf_lora.evaluate`."""
        return self.score(model, self.read({"eval": table}, given), "eval", asked)

    def refuse(self, options: Options, asked: Asked) -> None:
        """Refuse options of an evaluation that have no effect on this task.

        Raises:
            ConfigError: lists them.
        """
        values = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in self.options}
        values["completion_column"] = values.pop("label_column", None) or values.get("completion_column")
        refuse_options(self.name, values | ({} if self.has_system else {"system": asked.system}))
        if not asked.generate and not self.always_generates:
            refuse_options(f"{self.name} without generate=True (--generate)", {"max_new_tokens": asked.max_new_tokens})

    def length_of(self, given: Given) -> int:
        """The maximum tokens of a row of a language model."""
        limit = self.defaults.max_length
        return given.options.max_length or min(limit, given.window or limit)


def check_packages(task: Task) -> None:
    """Check that what the training of a task imports is installed.

    Raises:
        ConfigError: a package could not be imported.
    """
    for module, source in task.packages.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"{task.name} requires {module.partition('.')[0]}, which could not be imported ({error}). Run: "
                f"pip install {source}"
            ) from error


def refuse_options(what: str, values: Mapping[str, object]) -> None:
    """Refuse options that are given although they have no effect.

    Raises:
        ConfigError: lists them.
    """
    given = [f"{name}={value!r}" for name, value in values.items() if value is not None]
    if given:
        raise ConfigError(f"evaluate: {', '.join(given)} has no effect on {what}. Omit it.")


class Collected:
    """A `compute_metrics` for Trainer that keeps a part of the logits of each row, and computes all at the end.

    Args:
        keep: (logits, labels) -> what is kept instead of the logits, with a row for each row.
        compute: (what was kept, labels), one array for each row -> the metrics.
    """

    def __init__(
        self,
        keep: Callable[[Tensor, Tensor], Tensor],
        compute: Callable[[list[Any], list[Any]], dict[str, float]],
    ) -> None:
        self._keep, self._compute = keep, compute
        self._seen: tuple[list[Any], list[Any]] = ([], [])

    def preprocess_logits_for_metrics(self, logits: Any, labels: Any) -> Tensor:
        """What is kept of a batch."""
        return self._keep(logits[0] if isinstance(logits, (tuple, list)) else logits, labels)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        found: Any = prediction.predictions
        self._seen[0].extend(found)
        self._seen[1].extend(prediction.label_ids)
        if not compute_result:
            return {}
        seen, self._seen = self._seen, ([], [])
        return self._compute(*seen)


@torch.no_grad()
def score_batches(
    model: Any,
    rows: Any,
    collate: Collator,
    compute_metrics: Any,
    batch_size: int,
    outputs: Sequence[str] = ("logits",),
    targets: Sequence[str] = ("labels",),
) -> dict[str, float]:
    """The metrics of a model over rows, as Trainer computes them."""
    reduce = getattr(compute_metrics, "preprocess_logits_for_metrics", None)
    scores: dict[str, float] = {}
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            part = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            batch = {name: tensor.to(model.device) for name, tensor in collate(part).items()}
            true = [batch.pop(name) for name in targets]
            result = model(**batch)
            found = [getattr(result, name) for name in outputs]
            kept = [reduce(found[0], true[0])] if reduce is not None else found
            last = start + batch_size >= len(rows)
            scores = compute_metrics(EvalPrediction(_arrays(kept), _arrays(true)), compute_result=last)
    return scores


def _arrays(parts: Sequence[Any]) -> Any:
    """One array, or a tuple of several, as Trainer passes them."""
    flat = [p for part in parts for p in (part if isinstance(part, tuple) else (part,))]
    arrays = [part.float().cpu().numpy() if part.is_floating_point() else part.cpu().numpy() for part in flat]
    return arrays[0] if len(arrays) == 1 else tuple(arrays)


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of tokens, with special ones."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def label_of(data: Data, label: Any) -> str:
    """The name of a class, or a number."""
    return data.labels[label] if data.labels is not None else f"{label:g}"


def padded(tokenizer: Any) -> Any:
    """The tokenizer, with a padding token: batches of rows of different lengths need one."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def counts(rows: Mapping[str, Any]) -> str:
    """The number of rows of each split, such as `24 train, 8 test`."""
    return ", ".join(f"{len(part):,} {split}" for split, part in rows.items())


def from_columns(task: str, columns: Sequence[str | None], rows: Mapping[str, Any], kind: str) -> str:
    """The line that describes the rows of a run."""
    used = ", ".join(repr(c) for c in columns if c)
    return f"{task} from the columns {used}: {counts(rows)}{f', {kind}' if kind else ''}"


def truncation(cut: int, what: str) -> list[str]:
    """A line about rows that may have been truncated, if there are any."""
    text = f"{cut:,} {what} reach the token limit and may be truncated; --max-length raises the limit."
    return [text] if cut else []

"""The content of a card: facts about the adapter, from its files or a model, and about the run that trained it."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import EvalResult
from safetensors import SafetensorError, safe_open
from torch import nn

from ...config import LoraConfig
from ...errors import AdapterFileError, HubError
from ...files.format import WEIGHTS_NAME, read_config, read_extras
from ...files.keys import split_key
from ...files.save import adapter_state_dict, config_on_disk, extras_of
from ...safe_io.headers import read_header
from ..names import check_repository
from .escape import clean

TASK_TYPES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""PEFT's task type -> the Hub's task."""


@dataclass
class Adapter:
    """An adapter without the values of its tensors.

    Attributes:
        shapes: key in the file -> shape of the tensor.
        bytes, digest: size and hash of the weights file; None if it is not written yet.
    """

    config: LoraConfig
    extras: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    bytes: int | None = None
    digest: str | None = None

    @property
    def layers(self) -> list[str]:
        """Paths of the adapted layers."""
        return sorted({path for path, role in map(split_key, self.shapes) if role not in ("bias", "copy")})

    @property
    def whole(self) -> list[str]:
        """Paths of the modules that are saved completely, and not by a trained bias alone."""
        biases = self.config.bias != "none"
        copies = [path.rpartition(".") for path, role in map(split_key, self.shapes) if role == "copy"]
        return sorted({module for module, _, last in copies if not (biases and last == "bias")})

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def versions(self) -> dict[str, Any]:
        """Library -> its version at the save."""
        found = self.extras.get("versions")
        return found if isinstance(found, dict) else {}

    @property
    def base_is_on_hub(self) -> bool:
        """Whether the base was loaded from the Hub, with the name in the configuration, and not from a folder."""
        identity = self.extras.get("base")
        found = is_repository(self.config.base_model_name_or_path)
        return found and (not isinstance(identity, dict) or bool(identity.get("commit")))

    @property
    def architecture(self) -> str:
        """The name of the model's class."""
        return str(self.extras.get("architecture") or "")

    @property
    def classifies(self) -> bool:
        """Whether the model is a classifier with named classes."""
        return "Classification" in self.architecture or self.config.task_type in ("SEQ_CLS", "TOKEN_CLS")

    @property
    def labels(self) -> list[str]:
        """The names of a classifier's classes, in order; empty if they have only default names."""
        id2label = self.extras.get("id2label")
        if not self.classifies or not isinstance(id2label, dict):
            return []
        found = [str(id2label[key]) for key in sorted(id2label, key=lambda key: (len(key), key))]
        return [] if all(re.fullmatch(r"LABEL_\d+", label) for label in found) else found

    @property
    def unit(self) -> str:
        """The unit of the loss that the model computes; empty if unknown."""
        if self.task == "text-generation":
            return "nats per token"
        labels = self.extras.get("num_labels")
        crosses = self.classifies and isinstance(labels, int) and labels > 1
        return "nats" if crosses and self.extras.get("problem_type") != "regression" else ""

    @property
    def task(self) -> str | None:
        """The Hub's name of the task that the adapter was trained for."""
        from transformers.modelcard import TASK_MAPPING

        known = cast(dict[str, dict[str, str]], TASK_MAPPING)
        found = (task for task, names in known.items() if self.architecture in names.values())
        return next(found, None) or TASK_TYPES.get(self.config.task_type or "")


def read_facts(folder: Path) -> Adapter:
    """The adapter in a folder; its weights file is hashed but not loaded.

    Raises:
        AdapterFileError: the folder has no adapter, or it is malformed.
    """
    config, file = read_config(folder), folder / WEIGHTS_NAME
    if not file.is_file():
        raise AdapterFileError(f"{folder} has no {WEIGHTS_NAME}: save the adapter first, then write its card.")
    shapes = {entry.name: entry.shape for entry in read_header(file).entries}
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()[:32]
    return Adapter(config, read_extras(folder), shapes, file.stat().st_size, digest)


def facts_of(model: nn.Module, name: str, folders: Iterable[Path]) -> Adapter:
    """The adapter of a model, with size and hash if one of the folders holds the same values.

    Sharded tensors are not compared, since only one process calls this.
    """
    tensors = adapter_state_dict(model, name)
    spread = any(t.numel() == 0 or hasattr(t, "to_local") or t.is_meta for t in tensors.values())
    for folder in folders:
        with contextlib.suppress(AdapterFileError, SafetensorError, OSError):  # missing or malformed
            if spread or _same_values(folder, tensors):
                return read_facts(folder)
    config, extras = LoraConfig.from_dict(config_on_disk(model, name)), extras_of(model, name)
    config.task_type = extras["task_type"]
    return Adapter(config, extras, {key: tuple(t.shape) for key, t in tensors.items()})


def _same_values(folder: Path, tensors: Mapping[str, torch.Tensor]) -> bool:
    with safe_open(str(folder / WEIGHTS_NAME), "pt") as file:
        return set(file.keys()) >= set(tensors) and all(
            torch.equal(file.get_tensor(key), tensor.detach().cpu()) for key, tensor in tensors.items()
        )


# The run -------------------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """One result.

    Args:
        metric: its id, such as `accuracy`.
        value: a float; a string such as `nan` if it is not finite.
        data: description of the evaluation data.
        dataset: id of the dataset on the Hub.
        step: the training step of the evaluation, if it was before the saved weights.
    """

    metric: str
    value: float | str
    data: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    step: int | None = None

    def result(self, task: str) -> EvalResult:
        return EvalResult(
            task_type=task, dataset_type=self.dataset or "custom", dataset_name=self.data or self.dataset or "custom",
            metric_type=self.metric, metric_value=self.value, metric_name=title(self.metric),
            dataset_config=self.config, dataset_split=self.split, dataset_revision=self.revision,
        )  # fmt: skip


@dataclass
class Run:
    """Facts about the training, as plain values that a README stores as JSON; `unit` is that of the loss."""

    scores: list[Score] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None
    datasets: list[str] = field(default_factory=list)
    picture: bool = False
    unit: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def cleaned(self) -> Run:
        """The same without secrets and home directories in any text."""
        found = Run.from_json(_cleaned(self.to_json()))
        assert found is not None
        return found

    @classmethod
    def from_json(cls, values: Any) -> Run | None:
        """None if the values were edited and cannot be read."""
        try:
            run = cls(**values)
            run.scores = [Score(**score) for score in values["scores"]]
            texts = [*run.settings.items(), *run.versions.items(), run.datasets, [run.unit, run.command or ""]]
            texts += [(s.metric, *(v or "" for k, v in asdict(s).items() if k not in NUMBERS)) for s in run.scores]
        except (TypeError, KeyError, AttributeError):
            return None
        numbers = all(isinstance(s.value, float | str) and isinstance(s.step, int | None) for s in run.scores)
        return run if numbers and all(isinstance(part, str) for group in texts for part in group) else None


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {clean(key): _cleaned(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_cleaned(part) for part in value]
    return clean(value) if isinstance(value, str) else value


NUMBERS = ("value", "step")
"""The fields of a score that are not strings."""
TIMES = ("runtime", "samples_per_second", "steps_per_second", "preparation_time", "compilation_time", "num_tokens")
"""Suffixes of the timings in the results of `evaluate`, which are not metrics."""


def scores_of(metrics: Mapping[str, Any], prefix: str = "", **where: Any) -> list[Score]:
    """The results of `trainer.evaluate()` or of an `evaluate` metric as scores.

    Args:
        prefix: prefix of the names, such as `eval`.
        **where: further fields of `Score`.
    """
    start = f"{prefix}_" if prefix else ""
    named = {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}
    return [
        Score(name, _number(value), **where)
        for name, value in named.items()
        if name not in ("epoch", "step") and not name.endswith(TIMES)
        if hasattr(value, "__float__") and not isinstance(value, bool)
    ]


def _number(value: Any) -> float | str:
    """A number for JSON; a string if it is not finite or already a string."""
    number = value if isinstance(value, str) else float(value)
    return number if isinstance(number, str) or math.isfinite(number) else str(number)


def scores_given(results: Mapping[str, Any] | Iterable[EvalResult], data: str | None = None) -> list[Score]:
    """Results from a caller: a mapping such as `trainer.evaluate()` returns, or `EvalResult`s."""
    if isinstance(results, Mapping):
        prefixes = {key.removesuffix("_runtime") for key in results if key.endswith("_runtime")}
        prefixes = prefixes or {p for p in ("eval", "test") if all(key.startswith(f"{p}_") for key in results)} or {""}
        return [
            score for prefix in sorted(prefixes) for score in scores_of(results, prefix, data=data or prefix or None)
        ]
    return [
        Score(
            r.metric_type, _number(r.metric_value), r.dataset_name,
            None if r.dataset_type == "custom" else r.dataset_type, r.dataset_config, r.dataset_split,
            r.dataset_revision,
        )
        for r in results
    ]  # fmt: skip


def title(metric: str) -> str:
    """The display name of a metric."""
    names = {"f1": "F1", "macro_f1": "Macro F1", "rouge_l": "ROUGE-L", "chrf": "chrF", "mse": "MSE", "mae": "MAE"}
    return names.get(metric, metric.replace("_", " ").capitalize() if metric.islower() else metric)


def is_repository(name: str | os.PathLike[str] | None) -> bool:
    """Whether a name is a valid repository name and not a local path."""
    try:
        check_repository(os.fspath(name or ""), "")
    except HubError:
        return False
    return not Path(name or "").exists()

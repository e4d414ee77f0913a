"""What a card tells: of the adapter, read off its files or off a model, and of the run that trained it."""

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
from ...files.format import WEIGHTS_NAME, read_config, read_extras, split_key
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
    """An adapter without its numbers.

    Attributes:
        shapes: of its tensors, by their keys in the file.
        bytes, digest: of the file with the tensors; None where the card is written before it.
    """

    config: LoraConfig
    extras: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    bytes: int | None = None
    digest: str | None = None

    @property
    def layers(self) -> list[str]:
        """The adapted layers, by path."""
        return sorted({path for path, role in map(split_key, self.shapes) if role not in ("bias", "copy")})

    @property
    def whole(self) -> list[str]:
        """The modules that are kept whole, by path."""
        return sorted({path.rpartition(".")[0] for path, role in map(split_key, self.shapes) if role == "copy"})

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
        """Whether the base came from the Hub under the name in the configuration, rather than from a folder."""
        identity = self.extras.get("base")
        found = is_repository(self.config.base_model_name_or_path)
        return found and (not isinstance(identity, dict) or bool(identity.get("commit")))

    @property
    def architecture(self) -> str:
        """The name of the model's class."""
        return str(self.extras.get("architecture") or "")

    @property
    def classifies(self) -> bool:
        """Whether the model gives texts, images … or parts of them classes that have names."""
        return "Classification" in self.architecture or self.config.task_type in ("SEQ_CLS", "TOKEN_CLS")

    @property
    def labels(self) -> list[str]:
        """The names of a classifier's classes, in their order; none where nobody has named them."""
        id2label = self.extras.get("id2label")
        if not self.classifies or not isinstance(id2label, dict):
            return []
        found = [str(id2label[key]) for key in sorted(id2label, key=lambda key: (len(key), key))]
        return [] if all(re.fullmatch(r"LABEL_\d+", label) for label in found) else found

    @property
    def unit(self) -> str:
        """Of the loss that a model of this class computes by itself; empty where it is not sure."""
        if self.task == "text-generation":
            return "nats a token"
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
    """The adapter in a folder; its tensors are not read, but for a hash of their file.

    Raises:
        AdapterFileError: the folder holds no adapter, or a broken one.
    """
    config, file = read_config(folder), folder / WEIGHTS_NAME
    if not file.is_file():
        raise AdapterFileError(f"{folder} holds no {WEIGHTS_NAME}: save the adapter first, then write its card.")
    shapes = {entry.name: entry.shape for entry in read_header(file).entries}
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()[:32]
    return Adapter(config, read_extras(folder), shapes, file.stat().st_size, digest)


def facts_of(model: nn.Module, name: str, folders: Iterable[Path]) -> Adapter:
    """The adapter of a model; with its file, where one of the folders holds the same values.

    Values that are spread over devices are not compared: this is called by one process alone.
    """
    tensors = adapter_state_dict(model, name)
    spread = any(t.numel() == 0 or hasattr(t, "to_local") or t.is_meta for t in tensors.values())
    for folder in folders:
        with contextlib.suppress(AdapterFileError, SafetensorError, OSError):  # absent, or broken
            if spread or _same_values(folder, tensors):
                return read_facts(folder)
    config = LoraConfig.from_dict(config_on_disk(model, name))
    return Adapter(config, extras_of(model, name), {key: tuple(t.shape) for key, t in tensors.items()})


def _same_values(folder: Path, tensors: Mapping[str, torch.Tensor]) -> bool:
    with safe_open(str(folder / WEIGHTS_NAME), "pt") as file:
        return set(file.keys()) == set(tensors) and all(
            torch.equal(file.get_tensor(key), tensor.detach().cpu()) for key, tensor in tensors.items()
        )


# The run -------------------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """One number that was measured.

    Args:
        metric: its id, such as `accuracy`.
        value: a float; a text such as `nan` where it is not finite.
        data: what it was measured on, for people.
        dataset: the data set's id on the Hub.
        step: where it is of an earlier moment than the saved weights: after which step.
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
    """What is known of the training, in plain values, so that a README can hold it as JSON; `unit`: of the loss."""

    scores: list[Score] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None
    datasets: list[str] = field(default_factory=list)
    picture: bool = False
    unit: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> Run | None:
        """None where somebody has changed the values so that they cannot be read."""
        try:
            run = cls(**values)
            run.scores = [Score(**score) for score in values["scores"]]
            texts = [*run.settings.items(), *run.versions.items(), run.datasets, [run.unit, run.command or ""]]
            texts += [(s.metric, *(v or "" for k, v in asdict(s).items() if k not in NUMBERS)) for s in run.scores]
        except (TypeError, KeyError, AttributeError):
            return None
        numbers = all(isinstance(s.value, float | str) and isinstance(s.step, int | None) for s in run.scores)
        return run if numbers and all(isinstance(part, str) for group in texts for part in group) else None


NUMBERS = ("value", "step")
"""The fields of a score that are not texts."""
TIMES = ("runtime", "samples_per_second", "steps_per_second", "preparation_time", "compilation_time", "num_tokens")
"""How the names of what `evaluate` measures of itself, and not of the model, end."""


def scores_of(metrics: Mapping[str, Any], prefix: str = "", **where: Any) -> list[Score]:
    """The numbers of `trainer.evaluate()` or of an `evaluate` metric as scores.

    Args:
        prefix: `eval`, where the names begin with it.
        **where: further fields of `Score`.
    """
    start = f"{prefix}_" if prefix else ""
    named = {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}
    return [
        Score(clean(name), _number(value), **where)
        for name, value in named.items()
        if name not in ("epoch", "step") and not name.endswith(TIMES)
        if hasattr(value, "__float__") and not isinstance(value, bool)
    ]


def _number(value: Any) -> float | str:
    """A number as JSON can hold it; a text where it is not finite, or was one."""
    number = value if isinstance(value, str) else float(value)
    return number if isinstance(number, str) or math.isfinite(number) else str(number)


def scores_given(results: Mapping[str, Any] | Iterable[EvalResult], data: str | None = None) -> list[Score]:
    """Results as a caller has them: a mapping such as `trainer.evaluate()` returns, or `EvalResult`s."""
    if isinstance(results, Mapping):
        prefixes = {key.removesuffix("_runtime") for key in results if key.endswith("_runtime")}
        prefixes = prefixes or {p for p in ("eval", "test") if all(key.startswith(f"{p}_") for key in results)} or {""}
        return [
            score for prefix in sorted(prefixes) for score in scores_of(results, prefix, data=data or prefix or None)
        ]
    return [
        Score(
            clean(r.metric_type), _number(r.metric_value),
            clean(r.dataset_name), None if r.dataset_type == "custom" else clean(r.dataset_type),
            r.dataset_config, r.dataset_split, r.dataset_revision,
        )
        for r in results
    ]  # fmt: skip


def title(metric: str) -> str:
    """A metric's id for people."""
    return {"f1": "F1"}.get(metric, metric.replace("_", " ").capitalize() if metric.islower() else metric)


def is_repository(name: str | os.PathLike[str] | None) -> bool:
    """Whether a name is one on the Hub, or may be, rather than a folder here."""
    try:
        check_repository(os.fspath(name or ""), "")
    except HubError:
        return False
    return not Path(name or "").exists()

"""`recommend`: the settings that `hf-lora train` chooses for a model and data, with reasons and how sure they are.

The settings are those of `choose`, so a run has them by itself. Of the model, only the config is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapt.report import trainable_parameters
from ..config import LoraConfig
from ..data.tables import READERS
from ..files.format import read_adapter
from ..hub.download import local_adapter
from ..tasks.registry import CAUSAL_LM
from .defaults import PASSES, Choice, as_words, choose, trained_tokens, width_of
from .empty import empty_model, parameters_of_a_rank
from .forecast import trained_rows
from .parsing import Parsed, as_flag, parse_arguments, plain_values
from .run_data import read_rows
from .schedule import steps_of_rows

WIDTH = 100
_IN = "    "
_OTHERS = ("lora_r", "lora_alpha", "learning_rate", "per_device_train_batch_size", "num_train_epochs")
"""Settings that every recommendation has."""


@dataclass(frozen=True)
class Recommendation:
    """Recommended settings; `str()` is a text for the user.

    Args:
        task: of `hf-lora train`.
        facts: what they depend on, by name.
        settings: with reasons.
        given: the arguments of the run that were given.
        config: the `LoraConfig` of the settings.
    """

    task: str
    facts: Mapping[str, int]
    settings: list[Choice]
    given: Mapping[str, Any]
    config: LoraConfig

    def arguments(self) -> dict[str, Any]:
        """The arguments of `finetune` with all settings written out."""
        return {**self.given, **{name: value for each in self.settings for name, value in each.values.items()}}

    def to_config(self) -> LoraConfig:
        """The configuration of the adapter, for `apply_lora` or a Trainer."""
        return self.config

    def to_dict(self) -> dict[str, Any]:
        """The recommendation as JSON."""
        settings = [dataclasses.asdict(each) | {"values": dict(each.values)} for each in self.settings]
        return {"task": self.task, "facts": dict(self.facts), "settings": settings, "arguments": self.arguments()}

    def __str__(self) -> str:
        facts = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in self.facts.items())
        lines = [f"{self.task}: {facts}", ""]
        for each in self.settings:
            reason = f"{each.reason}. {each.doubt}" if each.doubt else f"{each.reason}."
            lines += [as_words(each.values), *textwrap.wrap(reason, WIDTH, initial_indent=_IN, subsequent_indent=_IN)]
        command = shlex.join(["hf-lora", "train", *(w for n, v in self.given.items() for w in _words(n, v))])
        return "\n".join([*lines, "", "A run chooses these by itself:", command])


def recommend(
    model: str | os.PathLike[str], dataset: str | os.PathLike[str], task: str | None = None, **arguments: Any
) -> Recommendation:
    """The settings with which to train an adapter: those that `hf-lora train` chooses, with reasons.

    Args:
        model: folder or Hub name; only its config and its tokenizer are read.
        dataset: the training rows: a file, a folder of images, or the name of a data set on the Hub.
        task: of `hf-lora train`. Default: from the columns.
        arguments: further arguments of `hf-lora train`, such as `label_column="category"`. What they set stays.

    Raises:
        ConfigError, DataError: what `finetune` would raise before it loads the model.
    """
    return advise(parse_arguments([], {**arguments_for(model, dataset, task), **arguments}))


def arguments_for(
    model: str | os.PathLike[str], dataset: str | os.PathLike[str], task: str | None = None
) -> dict[str, str | None]:
    """The arguments of a run for a model and data: a file or folder, or else the name of a data set."""
    is_file = os.path.exists(dataset) or Path(dataset).suffix.lower() in READERS
    return {"model": str(model), "train_file" if is_file else "dataset": str(dataset), "task": task}


def advise(parsed: Parsed) -> Recommendation:
    """The recommendation for the arguments of a run; see `recommend`."""
    training, given = parsed.training, plain_values(parsed, parsed.given)
    data = read_rows(parsed, writes=False)
    settings = choose(parsed, data).made
    config, chosen = training.lora_config(), {name for each in settings for name in each.values}
    left = {name: getattr(training, name) for name in _OTHERS if name not in chosen and name not in parsed.given}
    left |= {"lora_alpha": config.alpha} if "lora_alpha" in left else {}
    if training.lora_adapter is not None:  # which has its own rank
        left = {name: value for name, value in left.items() if not name.startswith("lora_")}
    if left:
        doubt = PASSES if data.task.name == CAUSAL_LM and "num_train_epochs" in left else ""
        settings.append(Choice(left, f"defaults of {data.task.name}, which do not depend on the data", doubt))
    facts = {"rows": len(data.rows["train"])}
    if data.labels is not None:
        facts["labels"] = len(data.labels)
    if data.task.name == CAUSAL_LM:
        facts["trained_tokens"] = trained_tokens(data)
    if (width := width_of(data)) is not None:
        facts["width"] = width
    for name, value in data.task.settings(data).items():
        setattr(data.config, name, value)
    model = empty_model(data.config, str(parsed.run.model), data.task.name, data.pooling)
    facts["parameters"] = trainable_parameters(model)[1]
    if training.lora_adapter is not None:  # which goes on as it is
        file = read_adapter(local_adapter(training.lora_adapter))
        config, facts["rank_of_the_adapter"] = file.config, file.config.r
        facts["parameters_of_the_adapter"] = sum(tensor.numel() for tensor in file.tensors.values())
    else:
        facts["parameters_of_the_adapter"] = config.r * parameters_of_a_rank(model, config)
    batch = training.train_batch_size * training.world_size
    facts["steps"] = steps_of_rows(training, trained_rows(parsed, data), batch)
    return Recommendation(data.task.name, facts, settings, given, config)


def _words(name: str, value: Any) -> list[str]:
    """An argument as words of a command line."""
    if value is True:
        return [as_flag(name)]
    values = value if isinstance(value, list | tuple) else [json.dumps(value) if isinstance(value, Mapping) else value]
    return [as_flag(name), *map(str, values)]

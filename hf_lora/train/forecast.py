"""What a run would train, without weights: the model is built on PyTorch's meta device, which holds none."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from ..adapt.targets import Explanation, explain_targets
from ..compat import is_own_model
from ..data.tasks import CAUSAL_LM, CLASSIFICATION, TASKS
from ..errors import ConfigError, nearest
from .base_model import check_name, load_base, read_config
from .parsing import Parsed

AUTO: dict[str, Any] = {CLASSIFICATION: AutoModelForSequenceClassification, CAUSAL_LM: AutoModelForCausalLM}
"""Task -> the auto class of its model."""


def targets_of(parsed: Parsed) -> Explanation:
    """The layers of a base model that the arguments of a run would adapt. Only its config is read.

    Raises:
        ConfigError: the model could not be read, or an argument is wrong.
        TargetError: see `explain_targets`.
    """
    run = parsed.run
    reason = check_name(str(run.model))
    if reason is None and run.task is not None and run.task not in TASKS:
        reason = f"--task {run.task} is unknown{nearest(run.task, TASKS)}; it is {' or '.join(TASKS)}"
    if reason is not None:
        raise ConfigError(f"hf-lora targets: {reason}.")
    config = read_config(str(run.model), run.model_revision)
    return explain_targets(empty_model(config, str(run.model), run.task), parsed.training.lora_config())


def empty_model(config: PretrainedConfig, name: str, task: str | None = None) -> Any:
    """The model of a config on the meta device.

    Args:
        name: the base model, for messages.
        task: of `TASKS`. Default: the class that the config names.
    """
    named = next(iter(config.architectures or []), "")
    own = getattr(transformers, named) if task is None and is_own_model(named) else None
    with torch.device("meta"):
        if own is not None:
            return own(config)
        return load_base((AUTO[task] if task is not None else AutoModel).from_config, name, config)

"""The tasks by name, and which of them the columns of a table are for."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PretrainedConfig

from ..adapt.labels import AUTO_CLASSES, task_type_of
from ..data.classes import MULTI_LABEL
from ..data.columns import CHATS, TRANSLATION
from ..data.tables import Table
from ..data.trained import TrainedFormat
from ..errors import DataError
from .base import Options, Task
from .causal_lm import CausalLM
from .embedding import Embedding
from .image_classification import ImageClassification
from .masked_lm import MaskedLM
from .multi_label import MultiLabel
from .preference import DPO, KTO, Preference, Reward
from .question_answering import QuestionAnswering
from .seq2seq_lm import Seq2SeqLM
from .text_classification import TextClassification
from .token_classification import TokenClassification

TEXT_CLASSIFICATION, CAUSAL_LM, EMBEDDING = TextClassification.name, CausalLM.name, Embedding.name
_ALL = (
    TextClassification(), MultiLabel(), TokenClassification(), QuestionAnswering(), ImageClassification(),
    MaskedLM(), Seq2SeqLM(), CausalLM(), DPO(), KTO(), Reward(), Embedding(),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
"""Name -> task."""
PREFERENCES = tuple(task.name for task in _ALL if isinstance(task, Preference))


def choose_task(table: Table, options: Options | None = None, config: PretrainedConfig | None = None) -> Task:
    """The task that a table's columns are for.

    Args:
        options: the columns that the user named, if any.
        config: of the base model.

    Raises:
        DataError: a named column does not exist, or the columns fit several tasks.
    """
    options, config = options or Options(), config or PretrainedConfig()
    for name in (options.label_column, options.completion_column, *(options.label_columns or ())):
        if name is not None and TRANSLATION not in table.columns:  # which has a column for each language
            table.column(name)
    if options.problem_type == MULTI_LABEL:
        return TASKS[MultiLabel.name]
    found = [task for task in _ALL if task.claims(table, options, config)]
    if any(name in table.columns for name in CHATS) and TASKS[CAUSAL_LM] in found:
        return TASKS[CAUSAL_LM]  # these names are unambiguous, whatever other columns there are
    if len(found) > 1:
        raise DataError(
            f"{table.source}: the columns {', '.join(map(repr, table.columns))} fit several tasks. Choose one with "
            f"{' or '.join(f'task={task.name!r}' for task in found)}."
        )
    if found:
        return found[0]
    return TASKS[Seq2SeqLM.name if config.is_encoder_decoder else CAUSAL_LM]


def task_of_model(model: Any, trained: TrainedFormat | None = None) -> Task | None:
    """The task that a model does: that of its training if it is recorded, else that of its class; None if unknown."""
    if trained is not None:
        found = next((task for task in _ALL if trained.kind in task.kinds), None)
        if found is not None and (found.name != CAUSAL_LM or not model.config.is_encoder_decoder):
            return found
    if model.can_generate():
        return TASKS[Seq2SeqLM.name if model.config.is_encoder_decoder else CAUSAL_LM]
    if task_type_of(model) == "SEQ_CLS" and model.config.problem_type == MULTI_LABEL:
        return TASKS[MultiLabel.name]
    return next((task for task in _ALL if _is_of(model, task)), None)


def _is_of(model: Any, task: Task) -> bool:
    """Whether the class of a model is one of a task's auto class."""
    mapping: Any = getattr(transformers, task.auto_class)._model_mapping
    name = AUTO_CLASSES.get(task_type_of(model) or "")
    if name is not None and name != "AutoModel":
        return name == task.auto_class
    config, classes = type(model.config), type(model).__mro__
    found = mapping.get(config, ())
    return any(cls in classes for cls in (found if isinstance(found, tuple) else (found,)))


def why_not(task: Task, config: PretrainedConfig) -> str | None:
    """Why a model cannot be trained for a task: transformers has no such class for it; None: it can."""
    mapping: Any = getattr(transformers, task.auto_class)._model_mapping
    if type(config) in mapping or task.auto_class in (getattr(config, "auto_map", None) or {}):
        return None
    return f"a {config.model_type}, for which transformers has no {task.auto_class} ({task.name})"

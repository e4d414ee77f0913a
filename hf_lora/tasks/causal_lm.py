"""Causal language modeling: chats, pairs of prompt and answer, or plain texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from ..data.chat import chat_rows, is_templated
from ..data.columns import ANSWERS, CHATS
from ..data.formats import describe, recognize_format
from ..data.preferences import as_trained
from ..data.tables import Table
from ..data.trained import TrainedFormat
from ..evaluation import language
from ..evaluation.metrics import build_compute_metrics
from ..evaluation.result import Evaluation
from .base import Asked, Data, Defaults, Given, Options, Task, refuse_options, truncation

HIGHEST_RATE = 2e-3


def rate_for_width(width: int, measured: int = 576, best: float = 1e-3, highest: float = HIGHEST_RATE) -> float:
    """The default rate of A for a model of this width, to two digits.

    The best rates of LoRA fall with about the 0.8th power of the width (Schulman et al. 2025, LoRA Without Regret).

    Args:
        measured, best: the width that was measured, and the rate that was best there; default: of language models.
        highest: the rate of narrow models.
    """
    return float(f"{min(highest, best * (measured / width) ** 0.8):.1e}")


class CausalLM(Task):
    name = "causal-lm"
    kinds = ("chat", "pair", "raw", "text")
    auto_class = "AutoModelForCausalLM"
    has_head = False
    defaults = Defaults(2e-4, 8, 8, 1024)
    packed = replace(defaults, per_device_train_batch_size=1, per_device_eval_batch_size=1)
    """Where rows are packed: a row then holds many texts."""
    metrics = ("accuracy", "perplexity")
    options = {
        "text_column": "question", "completion_column": "answer", "packing": True, "use_chat_template": True,
        "last_turn_only": False, "max_length": 1024,
    }  # fmt: skip
    packages = {"trl.trainer.sft_trainer": '"hf_lora[chat]"'}
    has_system = True

    def claims(self, table: Table, options: Options, config: PretrainedConfig) -> bool:
        if config.is_encoder_decoder:
            return False
        if options.label_column is not None or options.completion_column is not None:
            return options.completion_column is not None
        return any(name in table.columns for name in (*CHATS, *ANSWERS))

    def read(self, tables: Mapping[str, Table], given: Given) -> Data:
        from datasets import Dataset

        from .record import format_of_table

        options, tokenizer, cut = given.options, given.processor, 0
        data = Data(self, given.config, tokenizer, length=self.length_of(given))
        last_turn_only = bool(options.last_turn_only)
        for split, table in tables.items():
            form = recognize_format(table, options.text_column, options.completion_column)
            templated = is_templated(form, tokenizer, options.use_chat_template)
            data.lines.append(f"{split}: {describe(form, templated)}")
            if split == "train":
                data.trained = format_of_table(table, form, templated, data.length, last_turn_only)
            labelled, long = chat_rows(
                table, form, tokenizer, data.length,
                use_chat_template=options.use_chat_template, last_turn_only=last_turn_only,
            )  # fmt: skip
            columns = {key: [row[key] for row in labelled] for key in ("input_ids", "labels")}
            data.rows[split] = Dataset.from_dict(columns)
            cut += long
        data.lines += truncation(cut, "rows")
        return data

    def compute_metrics(self, data: Data, split: str) -> Any:
        return build_compute_metrics(list(self.metrics))

    def evaluate(self, model: Any, table: Table, given: Given, asked: Asked) -> Evaluation:
        trained, options, tokenizer = given.trained, given.options, given.processor
        table = as_trained(table, trained)
        if asked.system is not None:
            trained = replace(trained or TrainedFormat(), system=asked.system)
        form = recognize_format(table, options.text_column, options.completion_column, trained)
        if not is_templated(form, tokenizer, options.use_chat_template):
            refuse_options(f"{form.name} without a chat template", {"system": asked.system})
        if asked.generate:
            return language.score_answers(
                model, tokenizer, table, form, max_new_tokens=asked.longest, batch_size=asked.batch_size,
                use_chat_template=options.use_chat_template, file=asked.file, progress=asked.progress,
            )  # fmt: skip
        rows, cut = chat_rows(
            table, form, tokenizer, options.max_length or given.window or 2**31,
            use_chat_template=options.use_chat_template, last_turn_only=options.last_turn_only,
        )  # fmt: skip
        return Evaluation(language.score_rows(model, rows, asked.batch_size), cut=cut)

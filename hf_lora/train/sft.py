"""`LoraSFTTrainer`: TRL's SFTTrainer for LoRA adapters.

Packing, its collator, truncation and the training loop are TRL's. Added here: the assistant's tokens are found for any
chat template (`data.chat`), packed documents have separate attention (`loss.packed_attention`), and without a Triton
device the loss is `loss.frozen_head`'s: TRL's kernel multiplies every position by the head, trained or not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging
from transformers.utils.import_utils import is_triton_available
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ..adapt.state import require_state, set_trained_format, state_of
from ..compat import name_or_path
from ..data.chat import chat_rows
from ..data.formats import recognize_format
from ..data.tables import table_of
from ..errors import ConfigError, TargetError
from ..files.format import CONFIG_NAME
from ..layers.base import LoraLayer
from ..loss.frozen_head import FrozenHead
from ..loss.packed_attention import attention_by_document
from ..model import LoraModel
from .arguments import LoraArguments
from .former_names import accepts_former_names
from .rows import format_of_dataset, format_of_table
from .start import only_config
from .trainer import LoraTrainerMixin

logger = logging.get_logger(__name__)


@accepts_former_names
@dataclasses.dataclass
class LoraSFTConfig(LoraArguments, SFTConfig):
    """A drop-in replacement for `trl.SFTConfig` with the LoRA fields.

    Three defaults differ: rows are packed, only the assistant's tokens of chats are trained, and bfloat16 is off
    without an accelerator.

    Raises:
        ConfigError: lists every LoRA field with an invalid value.
    """

    packing: bool = dataclasses.field(
        default=True,
        metadata={"help": "Pack several rows into one of max_length tokens, without attention between them."},
    )
    assistant_only_loss: bool = dataclasses.field(
        default=True, metadata={"help": "Train only on the assistant's messages of chats."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16 = False
        super().__post_init__()

    @classmethod
    def of(cls, arguments: TrainingArguments, **more: Any) -> LoraSFTConfig:
        """The same arguments as those of another Trainer.

        Args:
            more: further fields, or other values.
        """
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments) if f.name in known}
        return cls(**{**given, **more})


class LoraSFTTrainer(LoraTrainerMixin, SFTTrainer):
    """A drop-in replacement for `trl.SFTTrainer` that trains a LoRA adapter.

    Takes SFTTrainer's arguments, in their order, and `lora_config` by keyword (see `LoraTrainerMixin`); `peft_config`
    is accepted in its place. `model` may also be the folder of an adapter, whose training then continues. Datasets of
    chats (`messages`, `conversations`, or lists of messages as `prompt` and `completion`) are labeled here, unless
    `assistant_only_loss` is off; TRL prepares all others.

    Raises:
        ConfigError: an argument cannot be used, or the tokenizer has no end token.
        DataError: lists every chat without trainable tokens.
        TargetError: the output head is adapted, which the loss over it would leave untrained.
    """

    def __init__(self, *args: Any, lora_config: Any = None, **kwargs: Any) -> None:
        given = inspect.signature(SFTTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        given.pop("self")
        lora_config = only_config(lora_config, given.pop("peft_config", None), type(self).__name__)
        model, config = given.get("model"), _config_of(given.get("args"), given.get("model"))
        if isinstance(model, str) and Path(model, CONFIG_NAME).is_file():
            options: Any = config.model_init_kwargs or {}
            given["model"] = LoraModel.from_pretrained(model, is_trainable=True, **options)
            given.setdefault("processing_class", _tokenizer(model, given["model"]))
            config.model_init_kwargs = None
        tokenizer = given.get("processing_class")
        if tokenizer is None:
            name = model if isinstance(model, str) else name_or_path(model)
            tokenizer = given["processing_class"] = AutoTokenizer.from_pretrained(name)
        if isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.eos_token is None:
            raise ConfigError(
                f"{type(self).__name__}(…): the tokenizer has no end token, so the model would not learn to stop. Set "
                "tokenizer.eos_token to the token that ends a text or a turn."
            )
        self._label_tokenizer, self._label_config = tokenizer, config
        self._labels_chats = config.assistant_only_loss and given.get("formatting_func") is None
        data = given.get("train_dataset") if given.get("formatting_func") is None else None
        self._trained = format_of_dataset(data, config.dataset_text_field, config.max_length)
        for name in ("train_dataset", "eval_dataset"):
            given[name] = self._labeled(given.get(name), name)
        # TRL would require marks in the template, and messages in data that are already labeled.
        config.assistant_only_loss = config.assistant_only_loss and not self._labels_chats
        with _keep_dtypes(given.get("model")):
            super().__init__(**{**given, "args": config}, lora_config=lora_config)
        config.assistant_only_loss = config.assistant_only_loss or self._labels_chats
        if self._trained is not None:
            set_trained_format(self._bare_model, self._trained)
        self._replace_fused_forward()

    def _adapt(self, model: nn.Module) -> None:
        fresh = state_of(model) is None
        super()._adapt(model)
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        if isinstance(head, LoraLayer):
            if fresh:
                model.unload()  # type: ignore[operator]  # after the error, the model is unchanged
            raise TargetError(
                f"{type(self).__name__}(…): the output head is adapted, but the loss over it reads only its weight, "
                "so the adapter would not be trained. Exclude the head from target_modules, or train it whole with "
                "modules_to_save."
            )

    # The data --------------------------------------------------------------------------------------------------------

    def _labeled(self, data: Any, name: str) -> Any:
        """A dataset of chats as tokens and labels; any other unchanged."""
        if isinstance(data, dict):
            return {key: self._labeled(part, f"{name}[{key!r}]") for key, part in data.items()}
        if not self._labels_chats or not isinstance(data, Dataset) or not len(data):
            return data
        if {"input_ids", "image", "images"} & set(data.column_names):
            return data
        first = {key: data[:1][key] for key in data.column_names}
        if not any(_is_chat(values[0]) for values in first.values()):
            return data
        table, limit = table_of(data, name), self._label_config.max_length or sys.maxsize
        data_format = recognize_format(table)
        rows, cut = chat_rows(table, data_format, self._label_tokenizer, limit)
        if name == "train_dataset":
            self._trained = format_of_table(table, data_format, True, self._label_config.max_length)
        if cut:
            logger.warning(
                f"{name}: {cut:,} of {len(rows):,} chats are longer than {limit:,} tokens and are truncated."
            )
        return Dataset.from_dict({key: [row[key] for row in rows] for key in ("input_ids", "labels")})

    # Training and evaluation -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _by_document(self) -> Iterator[None]:
        packed = self.padding_free and isinstance(self._bare_model, PreTrainedModel)
        with attention_by_document(self._bare_model) if packed else contextlib.nullcontext():
            yield

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Like `Trainer.train`; see `LoraTrainerMixin`."""
        with self._by_document():
            return super().train(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Like `SFTTrainer.evaluate`; datasets of chats are labeled as for training."""
        with self._by_document():
            return super().evaluate(self._labeled(eval_dataset, "eval_dataset"), *args, **kwargs)

    # The loss --------------------------------------------------------------------------------------------------------

    def _replace_fused_forward(self) -> None:
        """Replace TRL's fused loss over the head by `HeadLoss`, except where a Triton kernel computes it."""
        model: Any = self.model
        fused = model.__dict__.get("forward")
        if fused is None:
            return
        # It is an attribute of the instance, so it must be removed with the adapter.
        require_state(model, type(self).__name__).borrowed.append("forward")
        if is_triton_available() and self.args.device.type in ("cuda", "xpu"):
            return
        plain = types.MethodType(type(model).forward, model)

        @functools.wraps(type(model).forward)  # TRL's, Trainer and generate read the parameters
        def forward(own: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            wanted = fused_lm_head and not args and self._leaves_logits_out()
            head = self.head_loss.find(self._bare_model, kwargs) if wanted else None
            if head is None:
                return fused(*args, fused_lm_head=fused_lm_head, **kwargs)
            outputs, fault = _over_head(head, plain, own, kwargs)
            if outputs is None:
                self.head_loss.give_up(fault)
                return fused(fused_lm_head=True, **kwargs)
            return outputs

        model.forward = types.MethodType(forward, model)


def _over_head(
    head: FrozenHead, forward: Callable[..., Any], model: nn.Module, inputs: dict[str, Any]
) -> tuple[FusedCausalLMOutput | None, str | None]:
    """The result of TRL's forward with a fused head; None and the reason if the head does not fit."""
    with head.catch(model, inputs["labels"], entropy=True) as caught:
        outputs = forward(**inputs)
    scores = caught.scores
    if caught.fault is not None or scores is None:
        return None, caught.fault
    assert scores.entropy is not None
    # TRL has one position per label except the first.
    return FusedCausalLMOutput(
        loss=outputs["loss"], log_probs=scores.log_probs[:, :-1], entropy=scores.entropy[:, :-1],
        is_top1=scores.hits[:, :-1], label_mask=scores.mask[:, :-1], aux_loss=outputs.get("aux_loss"),
    ), None  # fmt: skip


@contextlib.contextmanager
def _keep_dtypes(model: Any) -> Iterator[None]:
    """Undo TRL's conversion of trainable parameters to bfloat16 in a model with a 4- or 8-bit base.

    Adapters are float32 master weights, and trained norms keep the base's dtype.
    """
    quantized = isinstance(model, nn.Module) and getattr(model, "is_quantized", False)
    kept = {p: p.data for p in model.parameters() if p.requires_grad} if quantized else {}
    try:
        yield
    finally:
        for parameter, values in kept.items():
            if parameter.dtype != values.dtype:
                parameter.data = values


def _config_of(arguments: TrainingArguments | None, model: Any) -> SFTConfig:
    if arguments is None:
        name = model if isinstance(model, str) else name_or_path(model)
        return LoraSFTConfig(f"{str(name).rpartition('/')[2] or 'model'}-SFT")
    return arguments if isinstance(arguments, SFTConfig) else LoraSFTConfig.of(arguments)


def _tokenizer(folder: str, model: Any) -> Any:
    has_own = Path(folder, "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(folder if has_own else name_or_path(model))


def _is_chat(cell: object) -> bool:
    first = cell[0] if isinstance(cell, list) and cell else None
    return isinstance(first, dict) and bool({"role", "from"} & set(first))

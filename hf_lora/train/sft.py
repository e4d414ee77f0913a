"""`LoraSFTTrainer`: TRL's SFTTrainer for LoRA adapters.

Packing, its collator, truncation and the training loop are TRL's. Added here: the assistant's tokens are found for any
chat template (`chats`), packed documents have separate attention (`loss.packed_attention`), and without a Triton
device the loss is `loss.frozen_head`'s: TRL's kernel multiplies every position by the head, trained or not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
)
from transformers.utils import logging
from transformers.utils.import_utils import is_triton_available
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ..adapt.state import require_state, set_trained_format, state_of
from ..compat import name_or_path
from ..errors import ConfigError, Faults
from ..files.format import CONFIG_NAME
from ..loss.frozen_head import FrozenHead
from ..loss.packed_attention import attention_by_document
from ..model import LoraModel
from ..tasks.record import format_of_dataset
from .arguments import TrlArguments
from .chats import IMAGES, first_row, formatted, is_chat, labeled
from .former_names import accepts_former_names
from .start import only_config, refuse_adapted_head, trainer_arguments
from .trainer import LoraTrainerMixin

logger = logging.get_logger(__name__)


@accepts_former_names
@dataclasses.dataclass
class LoraSFTConfig(TrlArguments, SFTConfig):
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


class LoraSFTTrainer(LoraTrainerMixin, SFTTrainer):
    """A drop-in replacement for `trl.SFTTrainer` that trains a LoRA adapter.

    Takes SFTTrainer's arguments, in their order, and those of `LoraTrainerMixin` by keyword; `peft_config` is accepted
    in place of `lora_config`. `model` may also be the folder of an adapter, whose training then continues. Datasets of
    chats (`messages`, `conversations`, or lists of messages as `prompt` and `completion`) are labeled here, unless
    `assistant_only_loss` is off or the model also reads images; TRL prepares all others.

    Raises:
        ConfigError: an argument cannot be used, or the tokenizer has no end token.
        DataError: lists every chat without trainable tokens.
        TargetError: the output head is adapted, which the loss over it would leave untrained.
    """

    def __init__(self, *args: Any, lora_config: Any = None, accept_ddp_fallback: bool = False, **kwargs: Any) -> None:
        kwargs = trainer_arguments(type(self), kwargs)
        given = inspect.signature(SFTTrainer.__init__).bind(self, *args, **kwargs).arguments
        given.pop("self")
        lora_config = only_config(lora_config, given.pop("peft_config", None), type(self).__name__)
        config = given["args"] = _config_of(given.get("args"), given.get("model"))
        before = {name: getattr(config, name) for name in ("assistant_only_loss", "model_init_kwargs")}
        try:
            first = first_row(given.get("train_dataset"))
            _load(given, config, AutoProcessor if IMAGES & first.keys() else AutoTokenizer)
            _check(given, config, type(self).__name__)
            self._assistant_only = config.assistant_only_loss
            data = given.get("train_dataset") if given.get("formatting_func") is None else None
            self._trained = format_of_dataset(data, config.dataset_text_field, config.max_length)
            # TRL requires marks in the template, and chats in all data.
            config.assistant_only_loss &= _is_for_trl(first, given["processing_class"])
            super().__init__(**given, lora_config=lora_config, accept_ddp_fallback=accept_ddp_fallback)
        finally:
            vars(config).update(before)
        if self._trained is not None:
            set_trained_format(self._bare_model, self._trained)
        self._replace_fused_forward()

    def _adapt(self, model: nn.Module) -> None:
        fresh = state_of(model) is None
        super()._adapt(model)
        refuse_adapted_head(model, fresh, type(self).__name__)

    # The data --------------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        # TRL calls this for each dataset, after it sets the end token and the template.
        prepare = super()._prepare_dataset
        first = {} if _is_transformed(dataset) else first_row(dataset)  # TRL refuses one with a transform
        if formatting_func is not None and first and "input_ids" not in first:
            dataset, formatting_func = formatted(dataset, formatting_func, args), None
        elif self._assistant_only and is_chat(first) and not isinstance(processing_class, ProcessorMixin):
            only = args.completion_only_loss is not False
            dataset, trained = labeled(dataset, dataset_name, processing_class, args, only, packing)
            if dataset_name == "train":
                self._trained = self._trained or trained
        if packing and (args.truncation_mode, args.packing_strategy) == ("keep_end", "bfd"):
            # Packing keeps the first tokens.
            dataset = prepare(dataset, processing_class, args, False, formatting_func, dataset_name)
        return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)

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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Like `SFTTrainer.evaluate`; datasets of chats are labeled as for training."""
        with self._by_document():
            return super().evaluate(*args, **kwargs)

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
            head = None
            if fused_lm_head and not args and self._leaves_logits_out():
                with _with_forward(own, inner):  # it may call the model
                    head = self.head_loss.find(self._bare_model, kwargs)
            if head is None:
                return fused(*args, fused_lm_head=fused_lm_head, **kwargs)
            outputs, fault = _over_head(head, plain, own, kwargs)
            if outputs is None:
                self.head_loss.give_up(fault)
                return fused(fused_lm_head=True, **kwargs)
            return outputs

        inner = model.forward = types.MethodType(forward, model)


@contextlib.contextmanager
def _with_forward(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, the model has this forward in place of Accelerate's around it.

    That is inside of one autocast for all calls; entered again within a call, it would stay on for good.
    """
    outer = model.__dict__["forward"]
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        model.__dict__["forward"] = outer


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


def _config_of(arguments: TrainingArguments | None, model: Any) -> SFTConfig:
    if arguments is None:
        name = model if isinstance(model, str) else name_or_path(model)
        return LoraSFTConfig(f"{str(name).rpartition('/')[2] or 'model'}-SFT")
    return arguments if isinstance(arguments, SFTConfig) else LoraSFTConfig.of(arguments)


def _load(given: dict[str, Any], config: SFTConfig, processing: Any) -> None:
    """Load the model if it is the folder of an adapter, and the tokenizer or processor (a class) if none is given."""
    model: Any = given["model"]
    options: Any = config.model_init_kwargs or {}
    options = {"trust_remote_code": config.trust_remote_code, **options}
    revision = options.pop("revision", None) if isinstance(model, str) else None
    where = {"trust_remote_code": config.trust_remote_code, "revision": revision}
    folder: Any = None
    if isinstance(model, str) and Path(model, CONFIG_NAME).is_file():
        folder, quantization = model, given.pop("quantization_config", None)
        options |= {} if quantization is None else {"quantization_config": quantization}
        model = LoraModel.from_pretrained(folder, is_trainable=True, base_revision=revision, **options)
        given["model"], config.model_init_kwargs = model, None
    if given.get("processing_class") is None:
        if folder is not None and Path(folder, "tokenizer_config.json").is_file():
            given["processing_class"] = AutoTokenizer.from_pretrained(folder)
        else:
            name = model if isinstance(model, str) else name_or_path(model)  # of an adapter: its base
            given["processing_class"] = processing.from_pretrained(name, **where)


def _check(given: Mapping[str, Any], config: SFTConfig, trainer: str) -> None:
    faults = Faults(f"{trainer}(…)")
    processing = given["processing_class"]
    tokenizer = getattr(processing, "tokenizer", processing)
    if isinstance(tokenizer, PreTrainedTokenizerBase) and (tokenizer.eos_token or config.eos_token) is None:
        faults.add(
            "the tokenizer has no end token, so the model would not learn to stop. Set tokenizer.eos_token, or "
            "eos_token in the arguments, to the token that ends a text or a turn"
        )
    if given.get("data_collator") is not None and config.packing and config.packing_strategy != "wrapped":
        faults.add("a data_collator is for rows that are not packed. Pass packing=False in the arguments")
    if config.activation_offloading and not torch.accelerator.is_available():
        faults.add("activation_offloading moves activations from an accelerator, and there is none. Leave it out")
    faults.check(ConfigError, "Nothing was changed.")


def _is_for_trl(row: Mapping[str, Any], processing_class: Any) -> bool:
    """Whether TRL finds the assistant's tokens: where a processor renders the chat, with images or without."""
    texts = {name: cell for name, cell in row.items() if name not in IMAGES}
    return isinstance(processing_class, ProcessorMixin) and is_chat(texts)


def _is_transformed(data: Any) -> bool:
    return isinstance(data, Dataset) and data.format["type"] == "custom"

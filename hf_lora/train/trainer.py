"""`LoraTrainer`: transformers' Trainer for models with adapters, and the mixin that does the same to any Trainer.

The training loop is Trainer's. What is added: the adapter is put into a model that has none, checkpoints hold the
adapter alone and are complete or do not count, resuming and the best model read adapters, B and the heads may have
rates of their own, the loss of a causal language model is computed over its frozen head without logits, and a guard
sees that every adapted layer learns.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Seq2SeqTrainer, Trainer
from transformers.utils import logging

from ..adapt.state import require_state, state_of
from ..apply import apply_lora
from ..compat import shifts_labels
from ..config import LoraConfig
from ..errors import AdapterFileError, ConfigError, StateError
from ..model import LoraModel
from .arguments import LoraArguments
from .card import CardMixin
from .checkpoint.manifest import (
    last_checkpoint,
    require_complete,
)
from .checkpoint.saving import SavingMixin
from .checkpoint.sigterm import save_between_steps
from .engines import check_alike, check_engine, equalize
from .head_loss import HeadLossMixin
from .memory import keep_freed_memory
from .optimizer import learning_rates, split_by_rate
from .precision import precision_line, quantization
from .start import announce, base_dtype, check_start, find_shared_inputs, hold_batchnorm
from .watch.finite import FiniteMixin, FiniteWatch
from .watch.guard import LayerGuard

logger = logging.get_logger(__name__)


class LoraTrainerMixin(SavingMixin, FiniteMixin, CardMixin, HeadLossMixin):
    """Put before any subclass of `transformers.Trainer`: `class MyLoraTrainer(LoraTrainerMixin, MyTrainer)`.

    Takes every argument of the Trainer that it is mixed into, in the same order, and two more by keyword.

    Args:
        lora_config: what to adapt: a `LoraConfig`, a mapping with its fields or a `peft.LoraConfig`. Where it is not
            given, the LoRA fields of the training arguments count (`LoraTrainingArguments`), else LoraConfig's
            defaults. Also applied to what `model_init` returns. A model that has adapters already is trained as it is.
        accept_ddp_fallback: train all the same where FSDP or DeepSpeed was asked for and Accelerate runs something
            else, as it does on a CPU; also a training argument.

    Raises:
        StateError: `lora_config` is given and the model has adapters already, or the model is sharded already.
        TargetError, ConfigError: the configuration does not fit the model; see `apply_lora`.
        ConfigError: the engine is not the one that was asked for, or is not supported.
        TrainingError: from `train`: nothing would be learned, or a value is not finite.
    """

    def __init__(
        self,
        *args: Any,
        lora_config: LoraConfig | Any | None = None,
        accept_ddp_fallback: bool = False,
        **kwargs: Any,
    ) -> None:
        self._lora_config = lora_config
        self._accept_ddp_fallback = accept_ddp_fallback
        self._started = False
        self._own_optimizer: Any = None
        self._batchnorm_hook: RemovableHandle | None = None
        self._counted: int | None = None
        self._sharing_is_due = False
        super().__init__(*args, **kwargs)
        self._base_dtype = base_dtype(self.model)
        self.guard = LayerGuard(getattr(self.args, "lora_guard_steps", LayerGuard.STEPS))
        self.guard.judges_values = False  # `finite` does, for the whole run
        self.finite = FiniteWatch(getattr(self.args, "nonfinite", "stop"))
        self.add_callback(self.finite)
        self.add_callback(self.guard)
        save_between_steps(self)
        self._adopt_metrics()

    # Where the adapter comes from ------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        # Trainer calls this first of all, with the seed set, the model (if one was given) and the arguments in place.
        asked = self.args.ddp_find_unused_parameters
        kwargs: Any = self.args.gradient_checkpointing_kwargs or {}
        if asked is None and self.args.gradient_checkpointing and not kwargs.get("use_reentrant", False):
            # Trainer turns the search for unused parameters off where there is checkpointing, though only the
            # reentrant kind cannot bear it. Adapters of layers that the task never calls need it: see guard.py.
            self.args.ddp_find_unused_parameters = True
        try:
            super().create_accelerator_and_postprocess()
        finally:
            self.args.ddp_find_unused_parameters = asked
        accepted = self._accept_ddp_fallback or getattr(self.args, "accept_ddp_fallback", False)
        check_engine(self.args, self.accelerator, self.model, accepted, type(self).__name__)
        if isinstance(self.model, nn.Module):
            self._adapt(self.model)
        own = type(self)._build_accelerator_args is Trainer._build_accelerator_args
        if own and self.accelerator.ddp_handler is not None:
            # Nobody else has asked for anything here. Gradients then lie in what is sent, and are not copied.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True

    def call_model_init(self, trial: Any = None) -> Any:
        model = super().call_model_init(trial)
        # Trainer writes a trial's values into the arguments later; those of the adapter are needed now.
        for name, value in self._values_of(trial).items():
            if name.startswith("lora_") and hasattr(self.args, name):
                setattr(self.args, name, value)
        self._adapt(model)
        return model

    def _values_of(self, trial: Any) -> dict[str, Any]:
        if trial is None or isinstance(trial, dict):
            return trial or {}
        space = getattr(self, "hp_space", None)
        return dict(space(trial) or {}) if space is not None else {}

    def _adapt(self, model: nn.Module) -> None:
        flags = self.args if isinstance(self.args, LoraArguments) else None
        given, state = self._lora_config, state_of(model)
        call = f"{type(self).__name__}(…, lora_config=…)"
        if state is None:
            config = flags.lora_config() if given is None and flags is not None else given
            if apply_lora(model, config, allow_bypassed=bool(flags and flags.lora_allow_bypassed)) is not model:
                raise StateError(
                    f"{call}: {type(model).__name__} has no task head. Call model = apply_lora(model, config, "
                    f"num_labels=…), which builds one, and hand what it returns to {type(self).__name__}."
                )
            state = require_state(model, call)
            reason = "lora_config is given" if given is not None else None
        elif given is not None:
            raise StateError(
                f"{call}: the model already has the adapters {', '.join(map(repr, state.adapters))}. Leave "
                "lora_config out to train the active one, call model.unload() to start again, or "
                "model.add_adapter(name, config) for one more."
            )
        else:
            reason = f"the model already has the adapters {', '.join(map(repr, state.adapters))}"
        state.resumable = True
        self._quantization = quantization(model)
        changed = flags.changed_lora_fields() if flags is not None and reason is not None else []
        configs = [record.config for record in state.adapters.values()]
        if flags is not None and changed and flags.lora_config() not in configs:
            logger.warning(f"These arguments have no effect, since {reason}: {', '.join(changed)}.")

    # The start of training -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. `resume_from_checkpoint=True` takes the newest complete checkpoint in `output_dir`.

        Raises:
            AdapterFileError: the checkpoint is not complete, holds no adapter, or does not fit the model.
            TrainingError: nothing would be learned, or a value is not finite.
        """
        if resume_from_checkpoint is True:
            folder = str(self.args.output_dir)
            resume_from_checkpoint = last_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise AdapterFileError(
                    f"train(resume_from_checkpoint=True): there is no complete checkpoint in {folder}. Call train() "
                    "to start from the beginning."
                )
        elif resume_from_checkpoint:
            require_complete(resume_from_checkpoint, contents=True)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.guard.finish()
            self.finite.finish()
            self._sharing_is_due = False
            if self._batchnorm_hook is not None:
                self._batchnorm_hook.remove()
                self._batchnorm_hook = None

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """As `Trainer.create_optimizer`; then B and the heads get the rates that the arguments ask for."""
        self._start()
        ratio = getattr(self.args, "loraplus_lr_ratio", None)
        head_rate = getattr(self.args, "head_learning_rate", None)
        present = getattr(self.optimizer, "optimizer", self.optimizer)
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        self._note_groups(optimizer)
        if (ratio is None and head_rate is None) or (present is not None and present is self._own_optimizer):
            return optimizer
        if present is not None:
            raise ConfigError(
                "loraplus_lr_ratio and head_learning_rate make the optimizer's parameter groups, but an optimizer was "
                "handed to the Trainer. Leave either out."
            )
        split_by_rate(optimizer, learning_rates(self._bare_model, self.args.learning_rate, ratio, head_rate))
        self._own_optimizer = optimizer
        self._note_groups(optimizer)
        return optimizer

    def _start(self) -> None:
        """Check and announce; every run of `train` comes by here with its model, before its first step."""
        if self._started:
            return  # under DeepSpeed, Trainer asks for the optimizer twice
        self._started = True
        model = self._bare_model
        check_start(model, f"{type(self).__name__}.train")
        check_alike(model, f"{type(self).__name__}.train")
        if self.is_fsdp_enabled:
            equalize(model)
        if self.is_world_process_zero():
            announce(model, self.args.learning_rate if self.optimizer is None else None)
            own = getattr(self.optimizer, "optimizer", self.optimizer)  # a second run finds it wrapped
            named = self.args.optim if own is None else type(own).__name__
            print(precision_line(model, self.accelerator, str(getattr(named, "value", named))))
            if base_dtype(model) != self._base_dtype:
                logger.warning(
                    f"An evaluation in half precision turned the base from {self._base_dtype} to {base_dtype(model)}, "
                    "so training starts from rounded weights. Train before evaluating, or load the model again."
                )
        self._counted = None
        if self.args.device.type == "cpu" and getattr(self.args, "keep_freed_memory", False):
            kept = keep_freed_memory()
            logger.info(
                f"keep_freed_memory: freed memory is {'kept' if kept else 'not kept, without glibc on Linux'}."
            )
        self._sharing_is_due = self._may_share_inputs()
        self._head_of = None  # another adapter may train the head, which the last one left frozen
        if not isinstance(model, LoraModel) and self._batchnorm_hook is None:
            self._batchnorm_hook = model.register_forward_pre_hook(hold_batchnorm)

    def _may_share_inputs(self) -> bool:
        """Whether layers may read an input together: not where others call them, cut them up or copy them."""
        return getattr(self.args, "share_inputs", True) and not (
            self.args.torch_compile
            or self.args.n_gpu > 1
            or self.is_deepspeed_enabled
            or self.is_fsdp_enabled
            or any(hasattr(p, "to_local") for p in self._bare_model.parameters())
        )

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.compute_loss`; before the first one of a run the layers that share an input are found."""
        if self._sharing_is_due and self._bare_model.training and torch.is_grad_enabled():
            # Here and not at the first batch of all: a resumed run has the same groups from its first step, too.
            self._sharing_is_due = False
            popped = {"labels"} if self.label_smoother is not None or self.compute_loss_func is not None else set()
            find_shared_inputs(self._bare_model, {k: v for k, v in inputs.items() if k not in popped})
        return super().compute_loss(model, inputs, *args, **kwargs)

    # Small things ----------------------------------------------------------------------------------------------------

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Trainer counts the parameters anew at every step, which takes longer the more tensors there are.
        name = getattr(self.model, "main_input_name", "input_ids")
        own = super().floating_point_ops
        if getattr(own, "__func__", None) is not Trainer.floating_point_ops or name not in inputs:
            return own(inputs)
        if self._counted is None:
            self._counted = own({name: torch.empty(1)})
        return int(inputs[name].numel()) * self._counted

    def _adopt_metrics(self) -> None:
        """Use what `build_compute_metrics` made to its full: reduced logits, labels shifted as the model does."""
        metrics: Any = self.compute_metrics
        if not hasattr(metrics, "preprocess_logits_for_metrics"):
            return
        if getattr(metrics, "shift_labels", False) is None:
            self.compute_metrics = metrics = copy.copy(metrics)
            metrics.shift_labels = shifts_labels(self)
        if self.preprocess_logits_for_metrics is None:
            self.preprocess_logits_for_metrics = metrics.preprocess_logits_for_metrics


class LoraTrainer(LoraTrainerMixin, Trainer):
    """`transformers.Trainer` that trains a LoRA adapter; takes its place in an existing script.

    Takes Trainer's arguments, in their order, and `lora_config` by keyword; see `LoraTrainerMixin`.
    """


class LoraSeq2SeqTrainer(LoraTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` that trains a LoRA adapter; takes its place in an existing script.

    Takes Seq2SeqTrainer's arguments, in their order, and `lora_config` by keyword; see `LoraTrainerMixin`.
    """

"""`LoraTrainer`: transformers' Trainer for models with adapters, and the mixin for any Trainer.

The training loop is Trainer's. `LoraTrainerMixin` overrides Trainer's methods, all in this file and, for the Hub, in
hub_methods.py, each in a few lines that call `CheckpointStore`, `HeadLoss`, `FirstBatch`, `Average`, the watches,
`CardWriter` and `Pusher`. After a release of Trainer, check these files; compat.py lists the private names in use.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Seq2SeqTrainer, Trainer
from transformers.utils import logging

from ..adapt.gather import gathered_state
from ..adapt.inner import adapted_part
from ..adapt.positions import check_positions, learned_positions
from ..compat import after_state_is_written, loads_to_plain_cpu, rotates_with
from ..config import LoraConfig
from ..model import LoraModel
from . import start
from .average import Average, with_average
from .card import CardWriter
from .checkpoint.manifest import checkpoint_to_resume, rotate_checkpoints
from .checkpoint.pushing import Pusher
from .checkpoint.sigterm import save_between_steps
from .checkpoint.store import CheckpointStore, forget_incomplete_best, save_run
from .engines import broadcast_trainable, check_engine
from .first_batch import FirstBatch
from .head_loss import HeadLoss, predict_over_head
from .hub_methods import HubMethods
from .initialize import initialize
from .new_tokens import tokenizer_of
from .optimizer import adopt_optimizer, check_optimizer, with_rates
from .packing import Packing, PaddedDocuments, unpacked
from .precision import KeptDtypes, quantization
from .reference import one_base
from .watch.base import Watch
from .watch.batchnorm import FrozenBatchNorm
from .watch.finite import FiniteWatch, check_finite, check_loss
from .watch.guard import LayerGuard

logger = logging.get_logger(__name__)


class LoraTrainerMixin(HubMethods):
    """A mixin for any subclass of `transformers.Trainer`: `class MyLoraTrainer(LoraTrainerMixin, MyTrainer)`.

    Takes every argument of that Trainer, in the same order, and two more by keyword.

    Args:
        lora_config: a `LoraConfig`, a mapping with its fields or a `peft.LoraConfig`. Default: the LoRA fields of the
            training arguments (`LoraTrainingArguments`), else LoraConfig's defaults. Also applied to the result of
            `model_init`. A model that already has adapters is trained unchanged. `peft_config` is the same.
        accept_ddp_fallback: train even if Accelerate runs another engine than requested; also a training argument.

    Raises:
        StateError: `lora_config` is given but the model already has adapters, or the model is already sharded.
        TargetError, ConfigError: the configuration does not fit the model; see `apply_lora`.
        ConfigError: the engine is not the requested one, or is not supported.
        TrainingError: from `train`: no parameter is trainable, or a value is not finite.
        AdapterFileError: from `train`: the checkpoint is not complete, or does not fit the model.
    """

    def __init__(
        self, *args: Any, lora_config: LoraConfig | Any = None, accept_ddp_fallback: bool = False, **kwargs: Any
    ) -> None:
        kwargs = start.trainer_arguments(type(self), kwargs)
        self._lora_config = start.only_config(lora_config, kwargs.pop("peft_config", None), type(self).__name__)
        self._accept_ddp_fallback, self._tokenizer = accept_ddp_fallback, tokenizer_of(args, kwargs)
        self._checkpoints, self._card, self._pusher = CheckpointStore(), CardWriter(), Pusher()
        self._first_batch, self._packing, self._dtypes = FirstBatch(), Packing(), KeptDtypes((*args, *kwargs.values()))
        self.average = self._checkpoints.average = Average()
        self._own_optimizer: Optimizer | None = None
        self._adapted: nn.Module | None = None
        self._flops_per_token: int | None = None
        self._step_loss: Tensor | None = None
        with one_base(self, (*args, *kwargs.values())):
            super().__init__(*args, **kwargs)
        self._base_dtype = start.base_dtype(self.model)
        self.head_loss = HeadLoss(getattr(self.args, "frozen_head_loss", True), self.is_world_process_zero())
        self.guard = LayerGuard(getattr(self.args, "lora_guard_steps", LayerGuard.STEPS))
        self.finite = FiniteWatch(getattr(self.args, "nonfinite", "stop"))
        for watch in (self.finite, self.guard, FrozenBatchNorm()):
            self.add_callback(watch)
        self.callback_handler.callbacks.insert(0, self.average)  # others may save the model at the end
        save_between_steps(self.callback_handler.callbacks)
        start.adopt_metrics(self)

    @property
    def _bare_model(self) -> Any:
        """The model without the wrappers of Accelerate and torch.compile."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def _adapted_model(self) -> Any:
        """The part of the bare model that has the adapters: see `adapted_part`."""
        return adapted_part(self._bare_model)

    @property
    def _is_sharded(self) -> bool:  # engines under which Trainer supports only PEFT models and full models
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _watches(self) -> list[Watch]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, Watch)]

    # Where the adapter comes from ------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        # Trainer calls this first, after it sets the seed, the model (if one was passed) and the arguments.
        with start.find_unused_parameters(self.args):
            super().create_accelerator_and_postprocess()
        accepts = self._accept_ddp_fallback or getattr(self.args, "accept_ddp_fallback", False)
        check_engine(self.args, self.accelerator, self.model, accepts, type(self).__name__)
        if isinstance(self.model, nn.Module) and self.model is not self._adapted:  # a search calls this for each trial
            self._adapt(self.model)
        own = type(self)._build_accelerator_args is Trainer._build_accelerator_args
        if own and self.accelerator.ddp_handler is not None:
            # No subclass configures DDP. Gradients are then views of the buckets, and are not copied.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True

    def call_model_init(self, trial: Any = None) -> Any:
        model = super().call_model_init(trial)
        start.apply_trial(self.args, trial, getattr(self, "hp_space", None))
        self._adapt(model)
        return model

    def _adapt(self, model: nn.Module) -> None:
        self._dtypes.restore()
        what = self._lora_config, self.args, type(self).__name__, self._tokenizer
        self.adapter_is_new = start.adapt(adapted_part(model), *what)
        self._adapted = self._checkpoints.whole = self.average.model = model
        self._checkpoints.quantization = quantization(model)
        self._positions = learned_positions(adapted_part(model))

    # The start of training -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Like `Trainer.train`; `resume_from_checkpoint=True` uses the newest complete checkpoint in `output_dir`."""
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            for watch in self._watches():
                watch.finished()
            self._first_batch.finished()

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)  # every run calls it; in a search, it sets the arguments of the trial
        self.average.begin(getattr(self.args, "ema", 0.0))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        initialize(self, self._adapted_model, resume_from_checkpoint)
        self._begin()
        if resume_from_checkpoint is not None:
            if self.average.is_running:  # again, as a batch was too large
                self._load_from_checkpoint(resume_from_checkpoint)
            self.average.resume(Path(resume_from_checkpoint))
        # Under these engines Trainer would look for a full model there, and for the engine's files.
        own = None if self._is_sharded else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, own)
        if resume_from_checkpoint is not None and own is None:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        if not self.is_deepspeed_enabled:
            check_optimizer(self.optimizer, self._adapted_model, self.args, self._own_optimizer is not None)
        return prepared

    def _begin(self) -> None:
        """The checks and log messages of every run of `train` before its first step."""
        model, call = self._adapted_model, f"{type(self).__name__}.train"
        start.check_start(self, model, call)
        if isinstance(self.optimizer, Optimizer):  # that of optimizers=; in a second run it is wrapped
            adopt_optimizer(self.optimizer, model)
        if self.is_fsdp_enabled:
            broadcast_trainable(model, self.args.device)
        if self.is_world_process_zero():
            logger.info("\n".join(start.start_lines(model, self.accelerator, self.optimizer, self.args)))
            start.warn_at_start(model, self.args if self.optimizer is None else None, self._base_dtype)
        self._flops_per_token = self._step_loss = None
        self._first_batch.restart(self, model)
        self.head_loss.restart()

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Like `Trainer.create_optimizer`; then sets the learning rates that are not common to all."""
        present = getattr(self.optimizer, "optimizer", self.optimizer)
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if present is None or present is not self._own_optimizer:
            own = with_rates(optimizer, self._bare_model, self.args, was_given=present is not None)
            if own is not None:
                self._own_optimizer = self.optimizer = optimizer = own
        if self.is_deepspeed_enabled:
            self._checkpoints.record_groups(optimizer)
        return optimizer

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        self.data_collator = self._packing.collator(self, self._bare_model)
        if isinstance(self.data_collator, PaddedDocuments) and not kwargs.get("is_training"):
            dataset = unpacked(dataset)
        return super()._get_dataloader(dataset, *args, **kwargs)

    # A step ----------------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Like `Trainer.training_step`; then the watches check the loss and the gradients of a whole step."""
        loss = super().training_step(*args, **kwargs)
        if self.is_deepspeed_enabled or self.optimizer is None:
            return loss
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        if self.accelerator.sync_gradients:
            whole, self._step_loss = self._step_loss, None
            for watch in self._watches():
                watch.before_step(self._adapted_model, self.optimizer, whole, self.state.global_step + 1)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Like `Trainer.compute_loss`; over the frozen head if the outputs are not needed."""
        check_positions(self._positions, inputs)
        bare = self._bare_model
        trains = bare.training and torch.is_grad_enabled()
        own, result = super().compute_loss, None
        plain = _is_trainers(own, Trainer.compute_loss)
        over_head = plain and not return_outputs and self._leaves_logits_out()
        if trains:
            scaled = plain and num_items_in_batch is not None and not (over_head and self.head_loss.find(bare, inputs))
            loss = (lambda batch, items: own(model, batch, False, items)) if scaled else None
            self._first_batch.look(self, bare, inputs, loss)
        if over_head:
            result = self.head_loss.compute(bare, inputs, lambda: own(model, inputs, False, num_items_in_batch))
        if result is None:
            result = own(model, inputs, return_outputs, num_items_in_batch)
        if self.is_deepspeed_enabled and trains:
            check_loss(result[0] if isinstance(result, tuple) else result, self.state.global_step + 1)
        return result

    @with_average
    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Like `Trainer.evaluation_loop`; during training with the averages of the weights, if there are any."""
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """Like `Trainer.prediction_step`; over the frozen head if the metrics are from `build_compute_metrics`."""
        own, found = super().prediction_step, None
        if self._leaves_logits_out() and _is_trainers(self._prepare_inputs, Trainer._prepare_inputs):
            inputs = self._prepare_inputs(inputs)  # a subclass's may generate, and must be called only once
            # The count of labels is Trainer's, so that the loss equals the one that Trainer reports.
            count = functools.partial(self._get_num_items_in_batch, [inputs], self.args.device)
            found = predict_over_head(
                self, self.head_loss, self._bare_model, inputs, prediction_loss_only,
                _is_trainers(own, Trainer.prediction_step),
                lambda batch: Trainer.compute_loss(self, model, batch, False, count()),
            )  # fmt: skip
        return own(model, inputs, prediction_loss_only, *args, **kwargs) if found is None else found

    def _leaves_logits_out(self) -> bool:
        """Whether the logits are not needed, so that the loss may be computed over the frozen head."""
        others = self.args.torch_compile or self.args.n_gpu > 1 or self.args.use_liger_kernel
        return not others and self.label_smoother is None and self.compute_loss_func is None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Trainer counts the parameters at every step, which is slow with many tensors.
        name, own = getattr(self.model, "main_input_name", "input_ids"), super().floating_point_ops
        if not _is_trainers(own, Trainer.floating_point_ops) or name not in inputs:
            return own(inputs)
        if self._flops_per_token is None:
            self._flops_per_token = own({name: torch.empty(1)})
        return int(inputs[name].numel()) * self._flops_per_token

    # Files -----------------------------------------------------------------------------------------------------------

    @with_average
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Like `Trainer.save_model`, for the adapter; TrainingError if a trained tensor has NaN or infinite values."""
        folder = str(output_dir or self.args.output_dir)
        check_finite(self._bare_model, f"save_model({folder!r})")
        if not self._is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        # Trainer would gather the base, or write the shards of this process.
        state = gathered_state(self._adapted_model)
        if self.args.should_save:  # older transformers let every process write in `_save`
            self._save(folder, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        own, adapted = super()._save, self._adapted_model
        whole = adapted is self._bare_model or not _is_trainers(own, Trainer._save)
        if whole and isinstance(adapted, LoraModel):
            own(output_dir, state_dict)
        elif self.args.should_save:  # a module without save_pretrained, of which Trainer would write all weights
            save_run(adapted, str(output_dir or self.args.output_dir), state_dict, self.processing_class, self.args)

    @with_average
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, bare, store = self.state.global_step, self._adapted_model, self._checkpoints
        folder = Path(self._get_output_dir(trial), f"checkpoint-{step}")
        with (
            store.writing(folder, bare, self.args.should_save, self.accelerator.wait_for_everyone),
            # trainer_state.json is the last file; the push and the deletion of older ones need the manifest.
            after_state_is_written(self.state, lambda: store.finish(folder, step, bare, self.optimizer)),
            rotates_with(functools.partial(rotate_checkpoints, newest=folder)),
        ):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # every process must write its file before the manifest lists them

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._is_sharded:
            self._checkpoints.save_optimizer(output_dir, self.optimizer, self.lr_scheduler, self.args.should_save)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, folder: str, model: nn.Module | None = None) -> None:
        initialize(self, self._adapted_model, folder)
        self._checkpoints.load_adapters(folder, self._adapted_model, lambda: self.optimizer or self.create_optimizer())

    def _load_best_model(self) -> None:
        logger.info(f"Loading best model from {self.state.best_model_checkpoint} (score: {self.state.best_metric}).")
        self._checkpoints.load_best(str(self.state.best_model_checkpoint), self._adapted_model)
        self.average.forget()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            forget_incomplete_best(self.state, self._get_output_dir(None))
            found = self._checkpoints.has_optimizer(checkpoint, self._adapted_model, self.optimizer)
            if self._is_sharded:
                if found:
                    self._checkpoints.load_optimizer(checkpoint, self.optimizer, self.lr_scheduler)
                return
        with loads_to_plain_cpu(self.args):
            super()._load_optimizer_and_scheduler(checkpoint)


def _is_trainers(method: object, own: object) -> bool:
    """Whether a bound method is Trainer's, and not overridden by a subclass."""
    return getattr(method, "__func__", None) is own


class LoraTrainer(LoraTrainerMixin, Trainer):
    """A drop-in replacement for `transformers.Trainer` that trains LoRA adapters; see `LoraTrainerMixin`."""


class LoraSeq2SeqTrainer(LoraTrainerMixin, Seq2SeqTrainer):
    """A drop-in replacement for `transformers.Seq2SeqTrainer` that trains LoRA adapters; see `LoraTrainerMixin`."""

"""The private names of other libraries that hf_lora uses, in one place.

Verified, unless stated otherwise, with transformers 5.17, 5.23 and 5.24, accelerate 1.15, torch 2.11 and 2.13, TRL
1.16 and DeepSpeed 0.19. tests/test_compat.py compares this file with the installed versions, so that a changed name
fails a test and not a training run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from torch import Tensor
    from transformers import PreTrainedModel, Trainer, TrainingArguments
    from transformers.trainer_jit_checkpoint import CheckpointManager

OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "_get_dataloader": ("dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"),
    "_load_best_model": (),
    "_hp_search_setup": ("trial",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_save_rng_state": ("output_dir",),
}
"""Private methods of `transformers.Trainer` that `LoraTrainerMixin` overrides -> their parameters after self.

Public methods that it overrides (`create_accelerator_and_postprocess`, `call_model_init`, `create_optimizer`,
`compute_loss`, `evaluation_loop`, `floating_point_ops`, `prediction_step`, `save_model`, `train`, `training_step`)
need no entry.
"""

CALLED: dict[str, tuple[str, ...]] = {
    "_build_accelerator_args": ("kwargs",),
    "_finish_current_push": (),
    "_get_num_items_in_batch": ("batch_samples", "device"),
    "_get_output_dir": ("trial",),
    "_load_scaler": ("checkpoint",),
    "_prepare_inputs": ("inputs",),
}
"""Private methods of `transformers.Trainer` that are called or checked -> their parameters after self."""

OF_TRL: dict[str, tuple[str, ...]] = {
    "_prepare_dataset": ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"),
}
"""Private methods of TRL's `SFTTrainer` that `LoraSFTTrainer` overrides -> their parameters after self."""

OF_GENERATION = ("_generate_single_turn", "_get_train_sampler")
"""Private methods of TRL's `GRPOTrainer` and `RLOOTrainer` that are overridden, and called with the same arguments."""

LOADING: dict[str, tuple[str, ...]] = {
    "conversion_mapping.get_model_conversion_mapping": ("model",),
    "core_model_loading.WeightConverter": ("source_patterns", "target_patterns", "operations"),
    "core_model_loading.WeightConverter.add_tensor": ("target_key", "source_key", "source_pattern", "future"),
    "core_model_loading.WeightConverter.convert": ("layer_name", "model", "config"),
    "core_model_loading.WeightRenaming": ("source_patterns", "target_patterns"),
    "core_model_loading.dot_natural_key": ("s",),
    "core_model_loading.rename_source_key": (
        "source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict",
    ),
    "modeling_utils.PreTrainedModel.tie_weights": ("missing_keys", "recompute_mapping"),
}  # fmt: skip
"""Functions of transformers that map the names in checkpoints -> their first parameters after self."""

CACHE = ("cache", "past_key_values")
"""Names of the argument and of the output that hold the cache of generation; the first since transformers 5.24."""

ATTRIBUTES: dict[str, str] = {
    "_BatchNorm": "torch.nn.modules.batchnorm",
    "_IncompatibleKeys": "torch.nn.modules.module",
    "_are_functorch_transforms_active": "torch._C",
    "_autograd": "torch._C",
    "_backward_hooks": "torch.nn.modules.module",
    "_base": "torch.Tensor",
    "_buffers": "torch.nn.modules.module",
    "_current_level": "torch.autograd.forward_ad",
    "_forward_hooks": "torch.nn.modules.module",
    "_forward_pre_hooks": "torch.nn.modules.module",
    "_load_from_state_dict": "torch.nn.modules.module",
    "_load_state_dict_pre_hooks": "torch.nn.modules.module",
    "_is_tracing": "torch._C",
    "_modules": "torch.nn.modules.module",
    "_non_persistent_buffers_set": "torch.nn.modules.module",
    "_orig_mod": "torch._dynamo.eval_frame",
    "_parameters": "torch.nn.modules.module",
    "_reversed_padding_repeated_twice": "torch.nn.modules.conv",
    "_save_to_state_dict": "torch.nn.modules.module",
    "_top_saved_tensors_default_hooks": "torch._C._autograd",
    "_unsafe_view": "torch.ops.aten",
    "_version": "torch.Tensor",
    "_pytree": "torch.utils",
    "_python_dispatch": "torch.utils",
    "_subclasses": "torch",
    "_commit_hash": "transformers.configuration_utils",
    "_name_or_path": "transformers.configuration_utils",
    "_gradient_checkpointing_func": "transformers.modeling_layers",
    "_hf_peft_config_loaded": "transformers.modeling_utils",
    "_init_weights": "transformers.modeling_utils",
    "_is_hf_initialized": "transformers.modeling_utils",
    "_is_quantized": "transformers.modeling_utils",
    "_keys_to_ignore_on_load_missing": "transformers.modeling_utils",
    "_loss_function": "transformers.modeling_utils",
    "_require_grads_hooks": "transformers.modeling_utils",
    "_tied_weights_keys": "transformers.modeling_utils",
    "_weight_conversions": "transformers.core_model_loading",
    "_model_mapping": "transformers.models.auto.auto_factory",
    "_hf_hook": "accelerate.hooks",
    "_old_forward": "accelerate.hooks",
    "_hp_mapping": "deepspeed.utils.tensor_fragment",
    "_z3_optimizer": "deepspeed.runtime.zero.stage3",
}
"""Private attributes that are used elsewhere in the package -> the module or class that has them."""


@contextlib.contextmanager
def held_load_report() -> Iterator[Callable[[], None]]:
    """Hold back the table of missing keys that `from_pretrained` logs; calling the yielded function logs it.

    The record comes from the logger of `transformers.modeling_utils` and has "LOAD REPORT" in its text.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        if is_report:
            held.append(record)
        return not is_report

    def release() -> None:
        logger.removeFilter(hold)
        while held:
            logger.handle(held.pop(0))

    logger.addFilter(hold)
    try:
        yield release
    finally:
        logger.removeFilter(hold)


def shifts_labels(trainer: Trainer) -> bool:
    """Whether the model's loss compares position t with label t + 1.

    Trainer has two criteria, each incomplete: the model's loss (`Trainer._loss_shifts_labels`, since 5.17), which
    depends on the class name, and whether the class is in the mapping of causal language models.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model = trainer.model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    causal = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return causal or bool(getattr(trainer, "_loss_shifts_labels", False))


def move_towards(tensors: list[Tensor], targets: list[Tensor], weight: float) -> None:
    """`tensor.lerp_(target, weight)` of all tensors together: `torch._foreach_lerp_`, as torch's Adam does."""
    import torch

    torch._foreach_lerp_(tensors, targets, weight)


def scales_loss(optimizer: object) -> bool:
    """Whether the loss is scaled (fp16), so that an occasional overflow of gradients is normal.

    `AcceleratedOptimizer.scaler` is None or absent without scaling.
    """
    return getattr(optimizer, "scaler", None) is not None


def push_is_running(trainer: Trainer) -> bool:
    """Whether Trainer is still uploading the last checkpoint (`Trainer.push_in_progress`, futures or None)."""
    push = getattr(trainer, "push_in_progress", None)
    return push is not None and not push.is_done()


def add_push(trainer: Any, job: Future[CommitInfo] | None) -> None:
    """Make Trainer wait for one more upload at the end (`PushInProgress.jobs`); no effect if `job` is None."""
    from transformers.utils.hub import PushInProgress

    if job is None:
        return
    if push_is_running(trainer):
        trainer.push_in_progress.jobs.append(job)
    else:
        jobs: Any = [job]
        trainer.push_in_progress = PushInProgress(jobs)


def running_trainer() -> Trainer | None:
    """The `transformers.Trainer` that is running a training step on this thread, found on the call stack."""
    found: Trainer | None = _running("training_step", "transformers.trainer")
    return found


def model_being_saved() -> PreTrainedModel | None:
    """The model whose `PreTrainedModel.save_pretrained` runs on this thread, found on the call stack."""
    found: PreTrainedModel | None = _running("save_pretrained", "transformers.modeling_utils")
    return found


def _running(method: str, module: str) -> Any:
    """The object whose `method`, of a class in `module`, runs on this thread; None if there is none."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == method and frame.f_globals.get("__name__") == module:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def train_batch_size(trainer: Trainer) -> int:
    """Rows per device and micro-batch: `Trainer._train_batch_size`, which auto_find_batch_size lowers."""
    return int(getattr(trainer, "_train_batch_size", None) or trainer.args.per_device_train_batch_size)


def handles_sigterm(manager: CheckpointManager) -> bool:
    """Whether a `CheckpointManager`'s handler (`_sigterm_handler`) is installed."""
    return bool(signal.getsignal(signal.SIGTERM) == manager._sigterm_handler)


@contextlib.contextmanager
def after_state_is_written(state: Any, then: Callable[[], None]) -> Iterator[None]:
    """Within, call `then` after Trainer writes trainer_state.json, the last file of a checkpoint.

    `Trainer._save_checkpoint` calls `TrainerState.save_to_json`, then pushes and deletes older checkpoints.
    """
    write = state.save_to_json

    def write_both(json_path: str) -> None:
        write(json_path)
        then()

    state.save_to_json = write_both
    try:
        yield
    finally:
        del state.save_to_json


@contextlib.contextmanager
def rotates_with(rotate: Callable[..., None]) -> Iterator[None]:
    """Within, Trainer deletes older checkpoints with `rotate` instead of `transformers.trainer.rotate_checkpoints`.

    Trainer calls it at the end of a save, with `output_dir`, `save_total_limit` and `best_model_checkpoint`.
    """
    trainer: Any = importlib.import_module("transformers.trainer")
    own = trainer.rotate_checkpoints

    def rotate_ours(output_dir: str, use_mtime: bool = True, **settings: Any) -> None:
        rotate(output_dir, **settings)

    trainer.rotate_checkpoints = rotate_ours
    try:
        yield
    finally:
        trainer.rotate_checkpoints = own


@contextlib.contextmanager
def loads_to_plain_cpu(args: TrainingArguments) -> Iterator[None]:
    """Within, `args.device` is `cpu` instead of `cpu:0`, to which `torch.load` cannot restore.

    With several processes Accelerate uses `cpu:0`, and Trainer 5.17 (not 5.23) loads the optimizer to `args.device`.
    `TrainingArguments._setup_devices` is the cached property behind it.
    """
    numbered = args.device
    if numbered.type != "cpu" or numbered.index is None:
        yield
        return
    vars(args)["_setup_devices"] = type(numbered)("cpu")
    try:
        yield
    finally:
        vars(args)["_setup_devices"] = numbered


def zero_partitions(optimizer: Any) -> list[Any] | None:
    """The flat float32 partitions that a DeepSpeed ZeRO optimizer trains on this process; None for other optimizers.

    `DeepSpeedZeroOptimizer_Stage3`, `DeepSpeedZeroOptimizer` (stages 1 and 2) and `BF16_Optimizer` in DeepSpeed 0.19.
    """
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        parts = getattr(optimizer, name, None)
        if parts is not None:
            return list(parts)
    return None


def link_states(zero: Any) -> None:
    """Link the states of a ZeRO-1/2 optimizer to its partitions, as its first step does.

    `_lazy_init_hp_params_optimizer_state`, `_hp_optimizer_states_linked` in DeepSpeed 0.19; not needed for stage 3.
    """
    link = getattr(zero, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        zero._hp_optimizer_states_linked = False
        link()


@contextlib.contextmanager
def second_models(trainer: type, load: Callable[..., Any], kind: type) -> Iterator[None]:
    """Within, TRL's trainers load models with `load(own, path, …)`, where `own(path, …)` is TRL's function.

    Each module of a trainer imports `create_model_from_path` by name, and `prepare_deepspeed` and `prepare_fsdp`,
    which here leave a model of class `kind` as it is.
    """
    replaced: list[tuple[Any, str, Any]] = []

    def replace(module: Any, name: str, make: Callable[[Any], Any]) -> None:
        if hasattr(module, name):
            replaced.append((module, name, getattr(module, name)))
            setattr(module, name, make(replaced[-1][2]))

    def unless_kind(own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda model, *args, **options: model if isinstance(model, kind) else own(model, *args, **options)

    try:
        for module in {sys.modules[cls.__module__] for cls in trainer.__mro__}:
            replace(module, "create_model_from_path", lambda own: functools.partial(load, own))
            for name in ("prepare_deepspeed", "prepare_fsdp"):
                replace(module, name, unless_kind)
        yield
    finally:
        for module, name, own in replaced:
            setattr(module, name, own)


def cache_in(values: Mapping[str, Any]) -> Any:
    """The cache of generation among the arguments or in the output of a call; None if there is none (`CACHE`)."""
    return next((values[name] for name in CACHE if values.get(name) is not None), None)


def counts_tokens(model: PreTrainedModel) -> bool:
    """Whether a model has a cache of generation that counts its tokens; the state of a state space does not.

    Before transformers 5.24 such a state had an argument with another name.
    """
    from transformers import DynamicCache

    if not inspect.signature(model.forward).parameters.keys() & {*CACHE}:
        return False
    try:
        DynamicCache(config=model.config).get_seq_length()
    except ValueError:  # all its layers are of the other kind
        return False
    return True


def name_or_path(model: Any) -> str:
    """The name or path that `from_pretrained` loaded a model from (`config._name_or_path`)."""
    return str(model.config._name_or_path)


def is_own_model(name: object) -> bool:
    """Whether `name` is a model class of transformers (`_class_to_module`), found without importing it.

    Model classes are in `models.<model>.modeling_<model>`; auto classes do not count.
    """
    import transformers

    module = getattr(transformers, "_class_to_module", {}).get(name) if isinstance(name, str) else None
    return isinstance(module, str) and re.fullmatch(r"models\.(?!auto\.)\w+\.modeling_\w+", module) is not None

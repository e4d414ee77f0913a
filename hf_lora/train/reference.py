"""The reference model of preference and RL trainers: the model as it was before training.

TRL's trainers load it a second time, unless they find a PEFT model, whose adapter they can switch off. Here they are
given `Reference`, a module without weights that computes with the model in training: with its adapters disabled, or,
where they were trained before, with the values that they had at first. So the first loss of DPO is ln 2 and the first
KL divergence 0, whatever the base is: quantized, resized, or changed in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapt.inner import adapted_part
from ..adapt.merge import disabled
from ..adapt.state import require_state
from ..adapt.walk import adapter_layers, parts
from ..compat import name_or_path, second_models
from ..errors import ConfigError, Faults
from ..files.format import CONFIG_NAME
from ..files.identity import differs, sample_weights
from ..layers.ops import evaluation_mode
from ..layers.parts import Part
from ..model import LoraModel

INSTEAD = (
    "To continue an adapter, merge it into its base (hf-lora merge ADAPTER --out FOLDER) and train a new adapter on "
    "FOLDER; or pass a reference, such as ref_model=LoraModel.from_pretrained(ADAPTER), if the trainer accepts one."
)


class Reference(nn.Module):
    """The model that training started from, computed by the model in training, without gradients or dropout.

    A trainer treats it as a model: it switches dropout off, replaces its forward and moves it. It has no modules and
    no tensors, and attributes set on it are dropped, so nothing of that reaches the model in training.

    Args:
        trainer: a `LoraTrainerMixin`; its `model` is read at each forward, because engines replace it.
        mixed: whether the reference follows the model (`sync_ref_model`), and so needs its own values from the start.
    """

    trainer: Any
    kept: list[tuple[Tensor, Tensor]] | None

    def __init__(self, trainer: Any, mixed: bool = False) -> None:
        super().__init__()
        changes_nothing = trainer.adapter_is_new and not mixed
        kept = None if changes_nothing else _first_values(adapted_part(trainer._bare_model), mixed)
        vars(self).update(trainer=trainer, kept=kept)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.trainer.model
        with torch.no_grad(), evaluation_mode(model), self._as_before():
            return model(*args, **kwargs)

    def mix(self, share: float) -> None:
        """Move the values of the reference towards those of the model: `share` of the model's, the rest its own."""
        for parameter, value in self.kept or ():
            value.lerp_(parameter.detach().to(value.device), share)

    @contextlib.contextmanager
    def _as_before(self) -> Iterator[None]:
        if self.kept is None:
            with disabled(adapted_part(self.trainer._bare_model)):
                yield
            return
        layers = adapter_layers(adapted_part(self.trainer._bare_model)).values()
        now = [parameter.data for parameter, _ in self.kept]
        try:
            for parameter, value in self.kept:
                parameter.data = value.to(parameter.device)
            for layer in layers:
                layer._lora.evaluated.clear()  # of the other values; an assignment to `data` is no new version
            yield
        finally:
            for (parameter, _), values in zip(self.kept, now, strict=True):
                parameter.data = values
            for layer in layers:
                layer._lora.evaluated.clear()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the model in training, whose hash is the key of a cache."""
        return self.trainer._bare_model.state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if "trainer" not in vars(self):  # a copy that is being made
            raise AttributeError(name)
        return getattr(self.trainer._bare_model, name)

    def __setattr__(self, name: str, value: object) -> None:
        """Drop the attribute."""


class SyncReference(TrainerCallback):
    """TRL's `SyncRefModelCallback`, which goes through two models by position, for a `Reference`."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:  # type: ignore[attr-defined]
            self.reference.mix(args.ref_model_mixup_alpha)  # type: ignore[attr-defined]


@contextlib.contextmanager
def one_base(trainer: Any, given: Iterable[object]) -> Iterator[None]:
    """Within, where a trainer of TRL is created: the base that it loads again is a `Reference`, and the folder of an
    adapter that it loads as the model is opened by `LoraModel`, to be trained.

    Args:
        given: the arguments of the trainer: a reference among them is the user's choice.

    Raises:
        ConfigError: the trainer has another reference, and it differs from the model before training.
    """

    def load(own: Callable[..., Any], source: str, *args: Any, **options: Any) -> Any:
        model = getattr(trainer, "model", None)
        if isinstance(model, nn.Module) and source == name_or_path(trainer._bare_model):
            return Reference(trainer, bool(getattr(trainer.args, "sync_ref_model", False)))
        if model is None and Path(source, CONFIG_NAME).is_file():
            loaded = LoraModel.from_pretrained(source, is_trainable=True, **_for_adapter(options))
        else:
            loaded = own(source, *args, **options)
        if model is None:
            trainer._dtypes.add(loaded)
        return loaded

    try:
        with second_models(type(trainer), load, Reference):
            yield
    finally:
        trainer._dtypes.restore()
    _keep_reference(trainer, given)


def _for_adapter(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `create_model_from_path`, for an adapter, which has its own number of labels."""
    base = {"dtype": options.get("dtype", torch.float32), "base_revision": options.get("revision")}
    return {name: value for name, value in options.items() if name not in ("num_labels", "revision")} | base


def _keep_reference(trainer: Any, given: Iterable[object]) -> None:
    model = adapted_part(trainer._bare_model)
    faults = Faults(f"{type(trainer).__name__}(…)")
    reference: Any = getattr(trainer, "ref_model", None)
    wants_sync = getattr(trainer.args, "sync_ref_model", False)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if reference is None and getattr(trainer, "precompute_ref_logps", False) and not sharded:
        trainer.ref_model = Reference(trainer)  # for data that are evaluated after training
    if reference is not None:
        reference = trainer.accelerator.unwrap_model(reference, keep_torch_compile=False)
    if isinstance(reference, Reference):
        trainer.ref_model = reference  # without the wrapper of a compiler
        if reference.kept is not None and sharded:
            faults.add("the reference needs the first values of the adapter, which this engine shards")
        elif wants_sync:
            for callback in [c for c in trainer.callback_handler.callbacks if hasattr(c, "sync_target_model")]:
                trainer.remove_callback(callback)
            trainer.add_callback(SyncReference(reference))
    elif wants_sync:
        faults.add("sync_ref_model=True copies the model's parameters by position, which adapters change")
    elif reference is not None and any(p.requires_grad for p in model.parameters()):  # else `train` refuses
        if all(reference is not value for value in given):
            for reason in _differences(model, reference):
                faults.add(f"the reference model, which is the base loaded again, is not the model to train: {reason}")
    faults.check(ConfigError, INSTEAD)


def _first_values(model: nn.Module, always: bool) -> list[tuple[Tensor, Tensor]] | None:
    """(parameter, its values now) of the active adapters; None if they change nothing yet."""
    owned = _active_parts(model)
    if not always and not any(_acts(part, copies=True) for part in owned):
        return None
    trained = (tensor for part in owned for _, tensor in part.tensors() if tensor.requires_grad)
    return [(tensor, tensor.detach().clone()) for tensor in trained]


def _active_parts(model: nn.Module) -> list[Part]:
    return [part for name in require_state(model, "Trainer").activity.active for part in parts(model, name)]


def _acts(part: Part, copies: bool) -> bool:
    """Whether a part may change outputs: factors unless those that are zero at first still are.

    Args:
        copies: the answer for a part without factors, such as a copy of a module.
    """
    factors = [tensor for spec, tensor in part.tensors() if spec.axes == "OR"]
    return any(bool(tensor.detach().count_nonzero()) for tensor in factors) if factors else copies


def _differences(model: nn.Module, reference: nn.Module) -> list[str]:
    found = []
    if any(_acts(part, copies=False) for part in _active_parts(model)):
        found.append("its adapter is already trained")
    kinds = [bool(getattr(m, "is_quantized", False)) for m in (model, reference)]
    if kinds[0] != kinds[1]:
        found.append("only one of them is quantized")
    rows = [m.get_input_embeddings().weight.shape[0] for m in (model, reference)]  # type: ignore[operator]
    if rows[0] != rows[1]:
        found.append(f"its vocabulary has {rows[0]} rows, and the reference's {rows[1]}")
    samples = [{"weights": sample_weights(m)} for m in (model, reference)]
    if kinds[0] == kinds[1] and differs(*samples):
        found.append("the weights of its base differ from those in the base's files")
    return found

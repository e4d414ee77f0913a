"""What a run would train and need, without weights: the model is built on PyTorch's meta device, which holds none."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

from ..adapt.report import adapter_table, trainable_parameters
from ..adapt.targets import Explanation, explain_targets
from ..apply import apply_lora
from ..errors import ConfigError, Faults, nearest
from ..files.format import read_adapter
from ..hub.download import local_adapter
from ..loss.frozen_head import CHUNK_ELEMENTS
from ..tasks.base import Data
from ..tasks.registry import CAUSAL_LM, EMBEDDING, PREFERENCES, TASKS, why_not
from .base_model import check_name, read_config
from .empty import empty_model
from .muon import factor_pairs
from .parsing import Parsed, as_flag
from .quantize import bits_of, dtype_of, quantized_bytes
from .run_data import pooling_of, read_data
from .schedule import steps_of_rows

logger = logging.get_logger(__name__)
ALLOCATOR = 1.4
"""Memory of a CPU per byte of activations: the C library keeps freed blocks (measured 1.3 to 1.5 with glibc)."""
_ADAM = 2
"""Moments that the optimizer keeps of each trained parameter, in float32; LoRA-Muon keeps one of them."""


@dataclass
class Forecast:
    """What a run would train and need; `str()` is a text for the user.

    Args:
        lines: the description of the data.
        targets: the table of adapted layers.
        trained, total: numbers of parameters.
        steps: number of optimizer steps.
        weights, gradients, optimizer, activations: bytes of memory at the peak of a step; averages of the weights
            count with the optimizer; the activations are those of the longest batch, with what a backward pass needs
            for a moment and what the allocator keeps; None where another library makes the batches, or an operator
            needs values.
        libraries: bytes of memory of Python and its libraries, if they share it with the tensors.
        adapter, checkpoint: bytes on disk.
    """

    lines: list[str]
    targets: str
    trained: int
    total: int
    steps: int
    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    libraries: int
    adapter: int
    checkpoint: int

    @property
    def memory(self) -> int:
        """Bytes at the peak, without activations that are not known."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0) + self.libraries

    def __str__(self) -> str:
        names = ("weights", "gradients", "optimizer", "activations", "libraries")
        parts = {name: getattr(self, name) for name in names}
        memory = ", ".join(f"{name} {_size(value)}" for name, value in parts.items() if value is not None)
        without = "" if self.activations is not None else ", and the activations of a batch, which are not forecast"
        share = 100 * self.trained / max(self.total, 1)
        return "\n".join([
            *self.lines,
            self.targets,
            f"{self.trained:,} of {self.total:,} parameters would be trained ({share:.2g}%), in {self.steps:,} steps",
            f"memory: {_size(self.memory)} ({memory}){without}",
            f"disk: {_size(self.adapter)} for the adapter, {_size(self.checkpoint)} for each checkpoint",
        ])  # fmt: skip


def forecast(parsed: Parsed) -> Forecast:
    """What a run would train and need. The data are read, and of the model only its config.

    Raises:
        ConfigError, DataError, TargetError: what `finetune` would raise before it loads the model.
    """
    data, run, training = read_data(parsed, writes=False), parsed.run, parsed.training
    for name, value in data.task.settings(data).items():
        setattr(data.config, name, value)
    model = empty_model(data.config, str(run.model), data.task.name, data.pooling)
    model = model.to(dtype_of(run.dtype, data.config))
    # Dropout on a CPU draws the dropped elements themselves, whose number is not known without values.
    former = training.lora_adapter
    config = training.lora_config() if former is None else read_adapter(local_adapter(former)).config
    apply_lora(model, dataclasses.replace(config, lora_dropout=0.0))
    if training.gradient_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its name since 5.24
    trained, total = trainable_parameters(model)
    sizes = {p: p.numel() * p.element_size() for p in model.parameters()}
    bits = bits_of(run)
    weights = sum(sizes.values()) if bits is None else quantized_bytes(model, bits)
    learned = sum(size for p, size in sizes.items() if p.requires_grad)
    on_cpu = training.device.type == "cpu"
    libraries = _resident() if on_cpu else 0
    activations = None
    if data.task.name not in (EMBEDDING, *PREFERENCES):  # another library makes their batches
        try:
            activations = int(max(_peak(model.train(), parsed, data) - learned, 0) * (ALLOCATOR if on_cpu else 1))
        except RuntimeError as error:  # an operator that has no form without values, such as grouped products
            logger.info(f"The activations are not forecast: {error}")
    state = _ADAM * 4 * trained if "adam" in str(getattr(training.optim, "value", training.optim)) else 0
    if training.muon_learning_rate is not None:
        state -= 4 * sum(factor.numel() for pair in factor_pairs(model) for factor in (pair.a, pair.b))
    state += 4 * trained if training.ema else 0
    return Forecast(
        data.lines, adapter_table(model), trained, total,
        steps_of_rows(training, trained_rows(parsed, data), training.train_batch_size * training.world_size),
        weights, learned, state, activations, libraries, learned, learned + state,
    )  # fmt: skip


def _peak(model: nn.Module, parsed: Parsed, data: Data) -> int:
    """The bytes of the largest batch, see `peak_of_step`."""
    rows, size = data.rows["train"], parsed.training.per_device_train_batch_size
    size = min(size, len(rows))
    if data.task.name == CAUSAL_LM:
        length = data.length if parsed.run.packing else max(map(len, rows["input_ids"]))
        return peak_of_step(model, (size, length), CAUSAL_LM)
    longest = sorted(rows, key=lambda row: -len(row["input_ids"])) if isinstance(rows, list) else rows  # else images
    batch = data.task.collator(data)([longest[i] for i in range(size)])
    wanted = {str(getattr(model, "main_input_name", "input_ids")), *data.task.targets}
    return _peak_of_call(model, {name: batch[name] for name in wanted if name in batch}, lambda found: found.loss)


def peak_of_step(model: nn.Module, shape: tuple[int, int], task: str) -> int:
    """Bytes of all tensors but the parameters, at the peak of a forward and a backward pass.

    Args:
        shape: (B, T) of the batch.
    """
    own: Any = model
    options, head = dict[str, Any](), 0
    if task == CAUSAL_LM:  # the loss over the frozen head: a chunk of logits at a time, and a gradient
        options["logits_to_keep"] = 1
        head = 3 * 4 * min(CHUNK_ELEMENTS, shape[0] * shape[1] * own.config.get_text_config().vocab_size)
    ids = torch.ones(shape, dtype=torch.long)
    return head + _peak_of_call(model, {"input_ids": ids}, lambda found: found.logits.float().sum(), options)


def _peak_of_call(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    loss: Callable[[Any], Tensor],
    options: Mapping[str, Any] | None = None,
) -> int:
    with FakeTensorMode():
        _to_fake(model)
        inputs = {name: torch.ones(tensor.shape, dtype=tensor.dtype) for name, tensor in batch.items()}
        with _Live() as live:
            loss(model(**inputs, **(options or {}))).backward()
    return live.peak


def _to_fake(model: nn.Module) -> None:
    """Replace the tensors of a model on meta by those of a CPU that hold nothing, so that its kernels are chosen."""
    made: dict[int, Any] = {}
    for module in model.modules():
        held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in held:
            if id(tensor) not in made:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            setattr(module, name, made[id(tensor)])


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations within it create, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet[Any]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {id(s) for s in map(_storage, tree_leaves((args, kwargs))) if s is not None}
        result = func(*args, **(kwargs or {}))
        for storage in map(_storage, tree_leaves(result)):
            if storage is None or id(storage) in given or storage in self._known:
                continue
            self._known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def _storage(value: object) -> Any:
    return value.untyped_storage() if isinstance(value, Tensor) else None


def targets_of(parsed: Parsed) -> Explanation:
    """The layers of a base model that the arguments of a run would adapt. Only its config is read.

    Raises:
        ConfigError: the model could not be read, or an argument is wrong.
        TargetError: see `explain_targets`.
    """
    run = parsed.run
    reason = check_name(str(run.model))
    if reason is None and run.task is not None and run.task not in TASKS:
        reason = f"--task {run.task} is unknown{nearest(run.task, TASKS)}; it is one of {', '.join(TASKS)}"
    if reason is not None:
        raise ConfigError(f"hf-lora targets: {reason}.")
    faults = Faults("hf-lora targets")
    for name in sorted(parsed.given - {"model", "model_revision", "task", "pooling"}):
        if not name.startswith("lora_"):
            faults.add(f"{as_flag(name)} has no effect on the layers that are adapted")
    faults.check(ConfigError, "Omit these. The options of `hf-lora train` that begin with --lora- have an effect.")
    config = read_config(str(run.model), run.model_revision)
    if run.task is not None and (reason := why_not(TASKS[run.task], config)):
        raise ConfigError(f"hf-lora targets: --model {run.model} is {reason}. Pass another --task.")
    pooling = None if run.task is None else pooling_of(parsed, TASKS[run.task], config)[0]
    return explain_targets(empty_model(config, str(run.model), run.task, pooling), parsed.training.lora_config())


def trained_rows(parsed: Parsed, data: Data) -> int:
    """The number of rows that are trained on, after packing."""
    rows = data.rows["train"]
    if data.task.name != CAUSAL_LM or not parsed.run.packing:
        return len(rows)
    from trl.data_utils import pack_dataset

    return len(pack_dataset(rows, data.length, strategy="bfd"))


def _resident() -> int:
    """Bytes of memory of this process; 0 where the system does not tell."""
    try:
        import psutil

        return int(psutil.Process().memory_info().rss)
    except (ImportError, OSError):
        return 0


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError

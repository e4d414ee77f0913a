"""Quantised linear layers: what they hold, read row by row as the backend itself would multiply by it.

A quantised layer computes its own product; LoRA is added to what it gives. No backend is imported here: who holds a
bitsandbytes or torchao weight has imported it. The values are those of the backend's own dequantisation, with its
rounding to the dtype that the weight had before it was quantised.

Nothing is ever written back. The values of a quantised weight lie on a coarse grid, an update is smaller than half a
step of it nearly everywhere, and rounding the sum to the grid again would take most of the update away. Merging makes
a dense layer instead: see adapt/dequantize.py.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import MergeError
from .base import Storage
from .extend import plain, rebase
from .sharded import is_sharded

CPU_GROUP = 32
"""Rows that bitsandbytes keeps together in the form that its CPU kernel for inference wants."""


class QuantizedStorage(Storage):
    """What the backends share: the layer is a linear one, multiplies by itself, and is never written to."""

    quantized = True
    attributes: tuple[str, ...] = ()
    """What the backend keeps on a layer and a dense one has no use for."""

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        return _features(layer)

    def form(self, layer: nn.Module) -> str:
        """Which of the backend's forms the weight has: values of one form are not those of another."""
        return self.kind

    def write(self, layer: nn.Module, rows: slice, block: Tensor) -> None:
        raise MergeError(f"its weight is quantised ({self.kind}); rounding a sum to that form would lose the update")

    def dense_class(self, layer: Any) -> type[nn.Module]:
        """The class of the layer once its weight is dense."""
        return nn.Linear

    def make_dense(self, layer: Any, weight: nn.Parameter) -> None:
        """Give `layer`, in place, a dense weight (O, I) and a class that multiplies by it.

        What stood as a `Conv1D` before it was quantised is one again, and the weight (I, O) then.
        """
        cls = self.dense_class(layer)
        for name in self.attributes:
            layer.__dict__.pop(name, None)
        hooks = layer._load_state_dict_pre_hooks
        for key in [k for k, hook in hooks.items() if _library(getattr(hook, "hook", hook)) == "bitsandbytes"]:
            del hooks[key]
        del layer.weight
        layer.weight = weight
        if layer.bias is not None:  # bitsandbytes may have cast it to the dtype of an input
            layer.bias.data = layer.bias.data.to(weight.dtype)
        if issubclass(cls, Conv1D):
            layer.nx, layer.nf = layer.__dict__.pop("in_features"), layer.__dict__.pop("out_features")
        rebase(layer, cls)


class Bits4Storage(QuantizedStorage):
    """bitsandbytes NF4 and FP4, with or without quantised block scales: two values a byte, blocks along the rows."""

    kind = "bitsandbytes 4-bit"
    attributes = (
        "compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu",
        "source_cls",
    )  # fmt: skip

    def owns(self, layer: nn.Module) -> bool:
        weight: Any = layer._parameters.get("weight")
        if not _is(weight, "bitsandbytes", "Params4bit"):
            return False
        state = _state_of(layer)
        return state is not None and tuple(state.shape) == _features(layer)

    def form(self, layer: nn.Module) -> str:
        return f"bitsandbytes {str(_state_of(layer).quant_type).upper()}"

    def dense_class(self, layer: Any) -> type[nn.Module]:
        return _source_class(layer)

    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        outputs, width = self.shape(layer)
        start, stop, _ = rows.indices(outputs)
        state, data = _state_of(layer), cast(Tensor, layer.weight).data
        if getattr(state, "packing_format_for_cpu", False):
            block = _from_cpu_form(data, state, start, stop)
        else:
            size = state.blocksize
            first, last = start * width // size, -(-stop * width // size)
            count = min(last * size, outputs * width) - first * size
            packed = data.reshape(-1).view(torch.uint8)[first * size // 2 : first * size // 2 + (count + 1) // 2]
            operation: Any = torch.ops.bitsandbytes.dequantize_4bit
            values = operation(packed, _scales(state, first, last), size, state.quant_type, [count], state.dtype)
            begin = start * width - first * size
            block = values.reshape(-1)[begin : begin + (stop - start) * width].view(-1, width)
        return block.to(torch.float32) if into is None else into.copy_(block)


def _state_of(layer: Any) -> Any:
    """bitsandbytes keeps what belongs to a 4-bit weight beside it, and on the layer where a copy lost it."""
    state = getattr(layer._parameters["weight"], "quant_state", None)
    return layer.__dict__.get("quant_state") if state is None else state


def _scales(state: Any, first: int, last: int) -> Tensor:
    """The scales of blocks `first` to `last` in float32, themselves dequantised where they are quantised."""
    scales = state.absmax[first:last]
    if not state.nested:
        return cast(Tensor, scales.to(torch.float32))
    outer = state.state2
    block = torch.arange(first, last, device=scales.device) // outer.blocksize
    return cast(Tensor, (outer.code[scales.long()] * outer.absmax[block] + state.offset).to(torch.float32))


def _from_cpu_form(data: Tensor, state: Any, start: int, stop: int) -> Tensor:
    """Rows of a weight (O, I/2) whose bytes lie as (groups of rows, I/2, row of the group)."""
    width = 2 * data.shape[1]
    first, last = start // CPU_GROUP, -(-stop // CPU_GROUP)
    groups = data[first * CPU_GROUP : last * CPU_GROUP].reshape(-1, width // 2, CPU_GROUP)
    pairs = torch.cat([groups & 15, groups >> 4], -1).view(-1, width // 2, CPU_GROUP, 2)
    codes = pairs.transpose(1, 2).reshape(-1, width)[start - first * CPU_GROUP :][: stop - start]
    scales = state.absmax[:, start:stop].t().to(torch.float32).repeat_interleave(state.blocksize, 1)
    return cast(Tensor, state.code.to(torch.float32)[codes.long()] * scales)


class Int8Storage(QuantizedStorage):
    """bitsandbytes LLM.int8: a byte a value, a scale a row. Its forward may round the activations too."""

    kind = "bitsandbytes int8"
    attributes = ("state", "index", "source_cls")

    def owns(self, layer: nn.Module) -> bool:
        weight: Any = layer._parameters.get("weight")
        if not _is(weight, "bitsandbytes", "Int8Params") or weight.dtype != torch.int8:
            return False
        return _row_scales(layer) is not None and tuple(weight.shape) == _features(layer)

    def dense_class(self, layer: Any) -> type[nn.Module]:
        return _source_class(layer)

    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        scales = cast(Tensor, _row_scales(layer))[rows].to(torch.float32).mul(1 / 127)
        block = cast(Tensor, layer.weight).data[rows].to(torch.float32) * scales[:, None]
        return block if into is None else into.copy_(block)


def _row_scales(layer: Any) -> Tensor | None:
    """They move from the weight to the layer's state in the first forward."""
    scales = getattr(layer._parameters["weight"], "SCB", None)
    return getattr(layer.state, "SCB", None) if scales is None else scales


class TorchaoStorage(QuantizedStorage):
    """torchao's weights: tensors that stand for a dense one, in an ordinary `nn.Linear`."""

    kind = "torchao"
    attributes = ("extra_repr",)

    def owns(self, layer: nn.Module) -> bool:
        weight: Any = layer._parameters.get("weight")
        known = isinstance(layer, nn.Linear) and _from(type(weight), "torchao")
        if not known or type(weight).dequantize is Tensor.dequantize or rounds_activations(weight):
            return False
        return tuple(weight.shape) == _features(layer)

    def form(self, layer: nn.Module) -> str:
        weight: Any = layer.weight
        dtype = getattr(weight, "target_dtype", getattr(getattr(weight, "qdata", None), "dtype", None))
        return f"torchao {str(dtype).removeprefix('torch.') if dtype else type(weight).__name__}"

    def dense_class(self, layer: Any) -> type[nn.Module]:
        return plain(type(layer))

    def block_rows(self, layer: nn.Module, wanted: int) -> int:
        """All of them where the packed form cannot be cut: such a weight is dequantised whole."""
        weight: Any = layer.weight
        count: int = weight.shape[0]
        try:
            return (
                wanted if weight.detach()[: min(wanted, count)].dequantize().shape[0] == min(wanted, count) else count
            )
        except (NotImplementedError, AssertionError, RuntimeError, ValueError):
            return count

    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        weight: Any = layer.weight.detach()  # type: ignore[operator]
        start, stop, _ = rows.indices(weight.shape[0])
        whole = (start, stop) == (0, weight.shape[0])
        block = (weight if whole else weight[start:stop]).dequantize()
        return block.to(torch.float32) if into is None else into.copy_(block)


def rounds_activations(weight: Any) -> bool:
    """Whether a torchao weight has its inputs quantised as well: no gradient then passes to them."""
    chosen = getattr(weight, "act_quant_kwargs", None), getattr(weight, "activation_quantization", None)
    return any(each is not None for each in chosen)


class OpaqueStorage(QuantizedStorage):
    """A quantised linear layer of another kind: it trains by its own forward, and cannot be read."""

    kind = "opaque"
    readable = False

    def owns(self, layer: nn.Module) -> bool:
        return _is_packed_linear(layer)

    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        raise MergeError(f"{why_unreadable(layer)}")


def why_unreadable(layer: nn.Module) -> str:
    """What is to be said of a layer that `OpaqueStorage` owns, where its weight is wanted."""
    weight = layer._parameters.get("weight")
    kept = "" if weight is None else f" with a weight kept as {type(weight).__name__} of {weight.dtype}"
    kind = plain(type(layer))
    return f"{kind.__module__}.{kind.__name__}{kept} is a quantised layer whose form is not known"


QUANTIZED: tuple[QuantizedStorage, ...] = (Bits4Storage(), Int8Storage(), TorchaoStorage(), OpaqueStorage())


def quantization_of(layer: nn.Module) -> QuantizedStorage | None:
    """How a linear layer's weight is quantised; None where it is dense, or is no linear layer."""
    weight = layer._parameters.get("weight")
    if type(weight) is nn.Parameter and weight.dtype.is_floating_point and weight.dtype.itemsize > 1:
        return None  # the common case, asked first
    if not isinstance(layer.__dict__.get("out_features"), int):
        return None
    return next((storage for storage in QUANTIZED if storage.owns(layer)), None)


def is_unfinished(layer: Any) -> bool:
    """Whether a bitsandbytes layer holds a weight that was never quantised: its forward fails.

    transformers leaves a module so that the base checkpoint did not hold, such as a new task head.
    """
    weight = layer._parameters.get("weight")
    if weight is None or weight.is_meta or not weight.dtype.is_floating_point:
        return False
    if _is(layer, "bitsandbytes", "Linear4bit"):
        return _state_of(layer) is None and tuple(weight.shape) == _features(layer)
    return _is(layer, "bitsandbytes", "Linear8bitLt") and not layer.state.has_fp16_weights


def is_packed(tensor: Tensor | None) -> bool:
    """Whether a parameter holds codes rather than numbers."""
    if tensor is None or is_sharded(tensor):
        return False
    ordinary = type(tensor) in (nn.Parameter, Tensor, nn.Buffer)
    return not ordinary or not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2


def _is_packed_linear(layer: nn.Module) -> bool:
    """in_features, out_features, codes in place of a weight, and a forward of one tensor."""
    features = (getattr(layer, name, None) for name in ("in_features", "out_features"))
    if not all(isinstance(n, int) for n in features) or hasattr(layer, "parametrizations"):
        return False
    weight = layer._parameters.get("weight")
    if weight is not None:
        if not is_packed(weight) or (_from(type(weight), "torchao") and rounds_activations(weight)):
            return False
        if type(weight) is nn.Parameter and plain(type(layer)).forward is nn.Linear.forward:  # type: ignore[attr-defined]
            return False  # integers that an ordinary product would take for numbers
    held = [*layer._parameters.values(), *layer._buffers.values()]
    if not any(is_packed(t) and cast(Tensor, t).dim() > 1 for t in held):
        return False
    taken = list(inspect.signature(plain(type(layer)).forward).parameters.values())[1:]  # type: ignore[attr-defined]
    needed = [p for p in taken if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 1 or (not needed and any(p.kind is p.VAR_POSITIONAL for p in taken))


def _features(layer: Any) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _source_class(layer: Any) -> type[nn.Module]:
    """transformers notes what it put a bitsandbytes layer in the place of."""
    source = layer.__dict__.get("source_cls", nn.Linear)
    return source if issubclass(source, (nn.Linear, Conv1D)) else nn.Linear


def _is(value: Any, library: str, name: str) -> bool:
    return any(c.__name__ == name and c.__module__.partition(".")[0] == library for c in type(value).__mro__)


def _from(cls: type, library: str) -> bool:
    return any(c.__module__.partition(".")[0] == library for c in cls.__mro__)


def _library(value: Any) -> str:
    return str(getattr(value, "__module__", "")).partition(".")[0]


# Training and sharding -----------------------------------------------------------------------------------------------

_PACKS, _PACKED_BEFORE = "support_avx512bf16_for_cpu", "_hf_lora_packs_for_cpu"


def keep_differentiable(modules: Iterable[nn.Module]) -> None:
    """Let no evaluation put 4-bit weights into a form from which training cannot go on.

    On CPUs with AVX512-BF16 bitsandbytes repacks a weight in its first forward outside training, for good. No gradient
    passes through such a weight. One that was repacked before is put back as bitsandbytes itself does to save it.
    """
    for module in modules if "bitsandbytes" in sys.modules else ():
        if not module.__dict__.get(_PACKS):
            continue
        module.__dict__[_PACKED_BEFORE] = module.__dict__[_PACKS]
        module.__dict__[_PACKS] = False
        state = _state_of(module)
        if getattr(state, "packing_format_for_cpu", False):
            module._save_to_state_dict({}, "", False)


def end_differentiable(modules: Iterable[nn.Module]) -> None:
    """Undo `keep_differentiable`, but for the form of the weights, which the next evaluation changes by itself."""
    for module in modules if "bitsandbytes" in sys.modules else ():
        if _PACKED_BEFORE in module.__dict__:
            before = module.__dict__.pop(_PACKED_BEFORE)
            if _PACKS in module.__dict__:
                module.__dict__[_PACKS] = before


def unshardable(model: nn.Module) -> list[str]:
    """Names of the quantised parameters that FSDP2 does not split between processes.

    Accelerate leaves 4-bit weights whole on every process where their codes are kept as integers, and says so in a
    warning only; int8 weights and torchao's fail under `fully_shard`. A 4-bit base that was loaded with
    `bnb_4bit_quant_storage=torch.bfloat16` has none of these.
    """
    names = []
    for name, parameter in model.named_parameters():
        if not parameter.dtype.is_floating_point or _from(type(parameter), "torchao"):
            names.append(name)
    return names

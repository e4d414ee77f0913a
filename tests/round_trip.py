"""The law of files: an adapter that was saved loads again, here bit for bit and in PEFT up to rounding."""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import relative_error
from packaging.version import Version
from peft.utils import transformers_weight_conversion
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter

from hf_lora.adapt.walk import parts
from hf_lora.files.load import load_adapter, load_adapter_weights
from hf_lora.files.save import save_adapter

ROUNDINGS = 64
"""Of float32, by which the outputs of a small model may differ between this library and PEFT."""

COMPONENTS = ("fc", "a_fc", "fc2", "block", "layers", "0", "1", "q", "lora_q", "score", "classifier", "pre_classifier")
"""Names of modules, some of which end with others."""
if Version(peft.__version__) < Version("0.20"):  # it takes a module called lora_q for one of its own
    COMPONENTS = tuple(name for name in COMPONENTS if name != "lora_q")


class Tree(nn.Module):
    """Modules with random names, run one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        for child in self._modules.values():
            assert child is not None
            x = torch.tanh(child(x) + x)
        return x


def random_tree(random_: random.Random, depth: int = 3) -> Tree:
    """A tree of linear layers, 4 -> 4, without one that has no layer."""
    tree = Tree()
    for name in random_.sample(COMPONENTS, random_.randint(2, 4)):
        inner = depth > 1 and random_.random() < 0.5
        tree.add_module(name, random_tree(random_, depth - 1) if inner else nn.Linear(4, 4))
    return tree


def output(model: Any, batch: dict[str, Tensor] | Tensor) -> Tensor:
    """The logits, the hidden states, or the output itself."""
    with torch.no_grad():
        found = model(batch) if isinstance(batch, Tensor) else model(**batch)
    if isinstance(found, Tensor):
        return found
    values: Tensor = found["logits"] if "logits" in found else found[0]
    return values


def skip_unless_peft_converts() -> None:
    """For models whose experts are one tensor. PEFT 0.19 passes an argument that transformers 5.17 does not take."""
    argument = "distributed_operation"
    passed = f"{argument}=" in inspect.getsource(transformers_weight_conversion)
    if passed and argument not in inspect.signature(WeightConverter).parameters:
        pytest.skip("this version of PEFT cannot convert weights with this version of transformers")


def in_peft(base: nn.Module, folder: Path) -> Any:
    """PEFT's model from a folder; a tensor that it does not find there is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    return loaded.eval()


def check_round_trip(
    model: nn.Module, base: nn.Module, batch: dict[str, Tensor] | Tensor, folder: Path, name: str = "default"
) -> None:
    """Save the adapter `name` of `model`, load it onto copies of `base`, and compare the outputs, twice over."""
    expected = output(model.eval(), batch)
    assert relative_error(expected, output(base.eval(), batch)) > 1e-3, "an adapter that does nothing proves nothing"
    save_adapter(model, folder / "first", name)
    again = copy.deepcopy(base)
    load_adapter(again, folder / "first")
    assert torch.equal(output(again.eval(), batch), expected), "it is another one when it is loaded again"
    with torch.no_grad():
        for part in parts(again, "default"):
            for _, tensor in part.tensors():
                tensor.zero_()
    load_adapter_weights(again, folder / "first")
    assert torch.equal(output(again, batch), expected), "it is another one when its values are loaded again"
    theirs = output(in_peft(base, folder / "first"), batch)
    bound = ROUNDINGS * torch.finfo(torch.float32).eps
    assert relative_error(theirs, expected) < bound, "it is another one in PEFT"
    save_adapter(again, folder / "second")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        first, second = ((folder / each / file).read_bytes() for each in ("first", "second"))
        assert first == second, f"{file} is another one when it is saved again"

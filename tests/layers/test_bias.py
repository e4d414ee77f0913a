"""Trained biases: `bias="all"` and `"lora_only"`, held to float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_near, assert_same_tensors, batch_for, randomize, snapshot, tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lora import LoraConfig, MergeError, StateError, apply_lora
from hf_lora.adapt.inject import eject, inject
from hf_lora.adapt.merge import disabled, merge, unmerge
from hf_lora.adapt.walk import parts
from hf_lora.layers.parts import Bias


class Every(nn.Module):
    """One of each layer whose bias can be trained, and some that have none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.conv1 = nn.Conv1d(8, 8, 3)
        self.linear = nn.Linear(34, 16)
        self.norm = nn.LayerNorm(16)
        self.norm2 = nn.LayerNorm((8, 16))
        self.transposed = Conv1D(12, 16)
        self.plain = nn.Linear(12, 5, bias=False)
        self.last = nn.Linear(5, 4)
        self.batchnorm = nn.BatchNorm1d(8)
        self.group = nn.GroupNorm(2, 8)
        self.root_norm = nn.RMSNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.conv(x).flatten(2))
        x = self.norm2(self.norm(self.linear(x)))
        return self.group(self.batchnorm(self.root_norm(self.last(self.plain(self.transposed(x))))))


TARGETS = ["conv", "linear", "transposed", "plain"]
TRAINED = {
    "all": {"conv", "conv1", "linear", "norm", "norm2", "transposed", "last", "batchnorm", "group"},
    "lora_only": {"conv", "linear", "transposed"},
}


def biases(model: Any) -> set[str]:
    return {part.path for part in parts(model) if isinstance(part, Bias)}


def every(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = Every().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.to(dtype)


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))[..., :8, :8].to(dtype)


def make(bias: str, dtype: torch.dtype = torch.float32) -> Any:
    model = every(dtype)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, bias=bias)  # type: ignore[arg-type]
    inject(model, config, "default")
    return randomize(model)


def exact(model: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A plain float64 model with folded weights and the trained biases, whose trained tensors are leaves."""
    plain = every().double()
    values: dict[str, Tensor] = {n: p.detach() for n, p in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        if name in values:
            values[name] = parameter.detach().double()
    leaves = {n: p.detach().double().requires_grad_(True) for n, p in model.named_parameters() if "lora_" in n}
    for path in TARGETS:
        a, b = leaves[f"{path}.lora_A.default.weight"], leaves[f"{path}.lora_B.default.weight"]
        delta = torch.einsum("or,ri...->oi...", b.flatten(1), a)
        values[f"{path}.weight"] = values[f"{path}.weight"] + 1.5 * (delta.t() if path == "transposed" else delta)
    for path in biases(model):
        values[f"{path}.bias"] = leaves[f"{path}.lora_bias.default.weight"]

    class Bound(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.func.functional_call(plain, values, (x,))  # type: ignore[no-any-return]

    return Bound(), leaves


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_which_biases_are_trained(bias: str) -> None:
    model = make(bias)
    assert set(biases(model)) == TRAINED[bias]
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora_bias" in n}
    assert trained == {f"{n}.lora_bias.default.weight" for n in TRAINED[bias]}
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_outputs_and_gradients_are_those_of_the_formula(bias: str, dtype: torch.dtype) -> None:
    model, x = make(bias, dtype), image(dtype)
    reference, leaves = exact(model)
    y, expected = model(x), reference(x.double())
    assert y.dtype == dtype
    assert_near(y, expected, dtype, factor=16)
    weights = torch.randn(expected.shape)  # norms would make a plain sum of squares constant
    (weights * y.float().square()).sum().backward()
    (weights.double() * expected.square()).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert found[name].dtype == torch.float32
        assert leaf.grad is not None
        assert_near(found[name], leaf.grad, dtype, factor=128)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_merging_folds_and_unmerging_restores(bias: str) -> None:
    model, x = make(bias), image()
    base = every()
    y, before = model(x), snapshot(model)
    merge(model)
    assert_near(model(x), y, torch.float32, 32)
    for path in TRAINED[bias]:
        layer = model.get_submodule(path)
        assert torch.equal(layer.bias, layer.lora_bias["default"].weight)
    with disabled(model):
        assert torch.equal(model(x), base(x))
    unmerge(model)
    assert_same_tensors(snapshot(model), before)
    assert torch.equal(model(x), y)
    eject(model)
    assert_same_tensors(snapshot(model), snapshot(base))
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in base.named_modules()}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("make_model", [tiny_bert, tiny_gpt2], ids=["bert", "gpt2"])
def test_a_fresh_bias_changes_no_bit(make_model: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = make_model().to(dtype)
        batch = batch_for(base)
        base.requires_grad_(False)
        expected = base(**batch).logits
        model = apply_lora(base, LoraConfig(r=4, bias="all", modules_to_save=[]))
        assert torch.equal(model(**batch).logits, expected)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**batch).logits
            with model.disable_adapter():
                assert torch.equal(model(**batch).logits, found)


def test_gpt2s_transposed_layers_train_their_biases() -> None:
    model = apply_lora(tiny_gpt2(), LoraConfig(r=4, bias="lora_only"))
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "lora_bias" in n]
    assert len(trained) == 8  # four layers in each of two blocks
    randomize(model)
    model(**batch_for(model)).loss.backward()
    assert all(model.get_parameter(n).grad.abs().sum() > 0 for n in trained)


def test_biases_are_each_adapters_own() -> None:
    model = randomize(apply_lora(tiny_bert(), LoraConfig(r=4, bias="all", modules_to_save=[])))
    batch = batch_for(model)
    first = model(**batch).logits
    model.add_adapter("second", LoraConfig(r=4, bias="all", modules_to_save=[]))
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".default." in n)
    with model.disable_adapter():
        base = model(**batch).logits
    assert torch.equal(model(**batch).logits, base)
    with pytest.raises(StateError, match="bias: 'default' and 'second' each have their own"):
        model.set_adapter(["default", "second"])
    model.set_adapter("default")
    assert torch.equal(model(**batch).logits, first)
    model.delete_adapter("default")
    model.delete_adapter("second")
    assert not biases(model)


def test_merge_and_unload_leaves_plain_biases() -> None:
    model = randomize(apply_lora(tiny_bert(), LoraConfig(r=4, bias="all")))
    batch = batch_for(model)
    y = model(**batch).logits
    twin = copy.deepcopy(model)
    plain = model.merge_and_unload()
    assert_near(plain(**batch).logits, y, torch.float32, 64)
    assert plain.state_dict().keys() == tiny_bert().state_dict().keys()
    assert_same_tensors(snapshot(twin.unload()), snapshot(tiny_bert()))


def test_a_bias_too_large_for_fp16_is_refused() -> None:
    model = make("all", torch.float16)
    with torch.no_grad():
        model.linear.lora_bias["default"].weight[0] = 1e6
    before = snapshot(model)
    with pytest.raises(
        MergeError, match=r"linear\.bias: a merged value is not finite, or too large for torch\.float16"
    ):
        merge(model)
    assert_same_tensors(snapshot(model), before)


def test_a_model_without_biases_is_not_harmed() -> None:
    model = apply_lora(tiny_llama(), LoraConfig(r=4, bias="all"))
    assert not biases(model)
    model(**batch_for(model)).loss.backward()


class ChannelsFirst(nn.LayerNorm):
    """As image models have it: its bias runs along another dimension than that of its parent class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Unusual(nn.Module):
    """Biases that act in another dimension, that a parent reads, or that two modules hold."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = ChannelsFirst(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)
        self.read = nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.zeros(5))
        self.head = nn.Linear(8, 5)
        self.head.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.movedim(-1, 1)).movedim(1, -1)
        x = self.block(self.attention(x, x, x)[0])
        return self.head(x + self.read.bias)  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [False, True])
def test_biases_act_whoever_reads_them(training: bool) -> None:
    model, plain = (Unusual().train(training) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8)
    inject(model, LoraConfig(target_modules=["read"], bias="all"), "default")
    assert biases(model) == {n.rpartition(".")[0] for n in plain.state_dict() if n.endswith(".bias")}
    assert_near(model(x), plain(x), torch.float32, 16)  # PyTorch has another kernel for frozen attention in eval
    randomize(model)
    with torch.no_grad():
        for path in biases(model):
            plain.get_parameter(f"{path}.bias").copy_(model.get_submodule(path).lora_bias["default"].weight)
    assert_near(model(x), plain(x), torch.float32, 16)
    weights = torch.randn(2, 3, 5)
    (weights * model(x)).sum().backward()
    (weights * plain(x)).sum().backward()
    for path in biases(model):
        found = model.get_submodule(path).lora_bias["default"].weight.grad
        assert_near(found, plain.get_parameter(f"{path}.bias").grad, torch.float32, 64)
    merge(model)
    assert_near(model(x), plain(x), torch.float32, 16)
    assert_same_tensors({"bias": model.bias}, {"bias": plain.bias})

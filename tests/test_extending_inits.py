"""Initializations from outside the package: what they take out of the base, and what they look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from helpers import assert_same_tensors, relative_error, snapshot, tiny_llama
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import Pair, Top, registered

from hf_lora import INITS, ConfigError, LoraConfig, LoraModel, StateError, TargetError, apply_lora, merge_files
from hf_lora.adapt.activation import set_active
from hf_lora.adapt.inject import eject, inject
from hf_lora.adapt.merge import disabled
from hf_lora.adapt.state import require_state
from hf_lora.adapt.walk import adapter_layers
from hf_lora.files.format import WEIGHTS_NAME
from hf_lora.files.load import load_adapter
from hf_lora.files.save import save_adapter

IDS = torch.arange(14).view(2, 7) % 32
LAYERS = ["0", "2"]


@pytest.fixture(autouse=True)
def entries() -> Iterator[None]:
    with registered():
        yield


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def trained_values(model: nn.Module, seed: int) -> None:
    """Random values for the factors that are trained; what was taken out stays."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 2)


def test_what_is_taken_out_leaves_the_base_and_other_adapters_as_they_are() -> None:
    x = torch.randn(4, 6)
    base, alone, model = net(), net(), net()
    inject(alone, LoraConfig(r=3, target_modules=LAYERS), "other")
    trained_values(alone, 3)
    with torch.no_grad():
        plain, other = base(x), alone(x)
    before = snapshot(base)
    inject(model, LoraConfig(r=2, target_modules=LAYERS, init_lora_weights="top"), "top")
    trained_values(model, 2)
    inject(model, LoraConfig(r=3, target_modules=LAYERS), "other")
    trained_values(model, 3)
    state = require_state(model, "test")
    with torch.no_grad():
        assert torch.equal(model(x), other)
        set_active(model, state, ("top", "other"))
        both = model(x)
        with disabled(model):
            assert torch.equal(model(x), plain)
    weights = []
    for layer in (model[0], model[2]):
        w = layer.weight.double()
        for name, own in layer._lora.adapters.items():
            factors = {kind: factor.weight.double() for kind, factor in layer.factors(name)}
            w = w + own.scaling * factors["lora_B"] @ factors["lora_A"]
            if "lora_A0" in factors:
                w = w - own.scaling * factors["lora_B0"] @ factors["lora_A0"]
        weights.append((w, layer.bias.double()))
    (w0, b0), (w2, b2) = weights
    expected = (x.double() @ w0.t() + b0).tanh() @ w2.t() + b2
    assert relative_error(both, expected) < 16 * torch.finfo(torch.float32).eps
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("lora_A0" in n or "lora_B0" in n for n in trained)
    eject(model)
    assert_same_tensors(snapshot(model), before)
    with torch.no_grad():
        assert torch.equal(model(x), plain)


def test_peft_reads_what_was_taken_out_as_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INITS, "pissa", Top())
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    model = apply_lora(tiny_llama(), config).eval()
    trained_values(model, 5)
    model.save_pretrained(tmp_path)
    assert not any("lora_A0" in key or "lora_B0" in key for key in load_file(tmp_path / WEIGHTS_NAME))
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    again = LoraModel.from_pretrained(tmp_path, base_model=tiny_llama())
    with torch.no_grad():
        found = model(IDS).logits
        assert torch.equal(again(IDS).logits, found)
        # PEFT takes the directions out of the stored weight, which rounds, and both round their products.
        assert relative_error(theirs(IDS).logits, found) < 64 * torch.finfo(torch.float32).eps
        assert relative_error(tiny_llama().eval()(IDS).logits, found) > 0.01


def test_merging_from_file_to_file_takes_out_the_same(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = apply_lora(
        type(tiny_llama()).from_pretrained(tmp_path / "base"),
        LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights="top"),
    )
    trained_values(model, 4)
    model.save_pretrained(tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    by_file = type(tiny_llama()).from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        unmerged = model.eval()(IDS).logits
        by_memory = model.merge_and_unload()
        assert relative_error(by_memory(IDS).logits, unmerged) < 64 * torch.finfo(torch.float32).eps
    assert_same_tensors(dict(by_file.state_dict()), dict(by_memory.state_dict()))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(7, 6, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("ranks", [{}, {"0": 5}], ids=["one rank", "a rank of its own"])
def test_inputs_are_looked_at_and_may_decide_the_ranks(ranks: dict[str, int], tmp_path: Path) -> None:
    model, base = net(), net()
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    config = LoraConfig(
        r=6, lora_alpha=6, target_modules=LAYERS, init_lora_weights="directions_60", rank_pattern=ranks
    )
    inject(model, config, batches=batches())
    with torch.no_grad():
        x = torch.cat(batches()).double()
        h = base[0](x.float()).tanh().double()
    for layer, seen in ((model[0], x), (model[2], h)):
        _, s, v = torch.linalg.svd(seen - seen.mean(0), full_matrices=False)
        shares = s.square().cumsum(0) / s.square().sum()
        r = int((shares < 0.6).sum()) + 1
        own = layer._lora.adapters["default"]
        assert (own.r, own.scaling) == (r, 6 / r)
        a = layer.lora_A["default"].weight.double()
        # The directions are those of the inputs up to their signs.
        assert torch.allclose((a @ v[:r].t()).abs(), torch.eye(r, dtype=torch.float64), atol=1e-5)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert all(m.training for m in model.modules())
    trained_values(model, 6)
    save_adapter(model, tmp_path)
    again = net()
    load_adapter(again, tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(again(x), model(x))


def test_gradients_are_those_of_the_weights_and_none_is_kept() -> None:
    class WithLoss(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square().sum()

    model, base = WithLoss(*net()), WithLoss(*net()).double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = LoraConfig(r=2, target_modules=LAYERS, init_lora_weights="downhill")
    inject(model, config, batches=batches())
    sum(base(x.double()) for x in batches()).backward()
    for ours, plain in ((model[0], base[0]), (model[2], base[2])):
        v = torch.linalg.svd(plain.weight.grad).Vh[:2]
        a = ours.lora_A["default"].weight.double()
        assert torch.allclose((a @ v.t()).abs(), torch.eye(2, dtype=torch.float64), atol=1e-4)
    assert all(p.grad is None for p in model.parameters())
    eject(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_checkpoints_weight_is_compared_with_the_one_in_memory() -> None:
    original, model = net(), net()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_((layer.weight * 4).round() / 4)  # coarse, as a quantized one
    config = LoraConfig(r=5, target_modules=LAYERS, init_lora_weights="lost")
    x = torch.randn(4, 6)
    with pytest.raises(ConfigError, match="original="):
        inject(model, config)
    inject(model, config, original=lambda name: original.get_submodule(name).weight.detach())
    restored = snapshot(original)
    with torch.no_grad():
        # The second layer, of rank 5, is restored as a whole.
        h = model[0](x).tanh()
        expected = h.double() @ restored["2.weight"].double().t() + restored["2.bias"].double()
        assert relative_error(model[2](h), expected) < 16 * torch.finfo(torch.float32).eps


def test_an_initialization_that_looks_at_batches_wants_some() -> None:
    model = net()
    before = snapshot(model)
    for init in ("directions", "downhill"):
        with pytest.raises(ConfigError, match=r"Call apply_lora\(model, config, name, batches=\[…\]\)"):
            inject(model, LoraConfig(target_modules=LAYERS, init_lora_weights=init))
    assert_same_tensors(snapshot(model), before)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="there is no initialization 'top_3'"):  # it takes no options
        apply_lora(tiny_llama(), LoraConfig(init_lora_weights="top_3"))


def test_a_vocabulary_does_not_grow_where_something_was_taken_out() -> None:
    """The same initialization would take something else out of the larger weight when the file is loaded."""
    model = apply_lora(tiny_llama(), LoraConfig(r=3, target_modules=["lm_head", "q_proj"], init_lora_weights="top"))
    before = snapshot(model)
    with pytest.raises(StateError, match=r"(?s)lm_head: the initialization of 'default'.*Resize the vocabulary"):
        model.resize_token_embeddings(80)
    assert_same_tensors(snapshot(model), before)


def test_a_collector_that_fails_leaves_the_model_as_it_was() -> None:
    class Skipping(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self[0](x)
            return y

    model = Skipping(*net())
    with pytest.raises((RuntimeError, ValueError)):  # the second layer is never called, so there is nothing to sum up
        inject(model, LoraConfig(target_modules=LAYERS, init_lora_weights="directions"), batches=batches())
    assert all(m.training and not m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_weight_without_a_call_of_its_own_has_no_inputs_to_look_at() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(Pair(6, 7, 5), nn.Linear(5, 5))
    with pytest.raises(TargetError, match=r"0\.first: this weight is not a module, so its inputs cannot be collected"):
        inject(model, LoraConfig(target_modules=["0", "1"], init_lora_weights="directions"), batches=batches())
    inject(model, LoraConfig(r=4, target_modules=["0", "1"], rank_pattern={"0.first": 3, "0": 2}))
    layers = {name: site._lora.adapters["default"].r for name, site in adapter_layers(model).items()}
    assert layers == {"0.first": 3, "0.second": 2, "1": 4}


@pytest.mark.parametrize("rslora", [False, True])
def test_what_cannot_be_taken_out_again_is_in_the_file_as_further_ranks(rslora: bool, tmp_path: Path) -> None:
    config = LoraConfig(
        r=3, lora_alpha=5, use_rslora=rslora, target_modules=["q_proj", "down_proj"], init_lora_weights="once",
        rank_pattern={"layers.1.mlp.down_proj": 2},
    )  # fmt: skip
    model = apply_lora(tiny_llama(), config).eval()
    trained_values(model, 8)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    ours = LoraModel.from_pretrained(tmp_path, base_model=tiny_llama())
    with torch.no_grad():
        found = model(IDS).logits
        for loaded in (theirs, ours):
            assert relative_error(loaded(IDS).logits, found) < 64 * torch.finfo(torch.float32).eps
    other = apply_lora(tiny_llama(), config).eval()
    with torch.no_grad():
        assert not torch.equal(other(IDS).logits, found)
        other.load_adapter_weights(tmp_path)
        assert torch.equal(other(IDS).logits, found)
    assert_same_tensors(snapshot(other), snapshot(model))
    with pytest.raises(ConfigError, match="is all that matters"):
        apply_lora(tiny_llama(), LoraConfig(init_lora_weights="once", method="gain"))

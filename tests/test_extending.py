"""Proof that a method, an initialization, a shape and a storage from outside the package need only `register`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, assert_same_tensors, randomize, snapshot, tiny_llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import Doubled, Gain, Negated, Pair, Stack, registered

from hf_lora import (
    METHODS,
    AdapterFileError,
    ConfigError,
    LoraConfig,
    LoraModel,
    MergeError,
    apply_lora,
    check_adapter,
    explain_targets,
    inspect_adapter,
    merge_files,
    register,
)
from hf_lora.adapt.activation import set_active
from hf_lora.adapt.inject import delete, eject, inject
from hf_lora.adapt.merge import merge, unmerge
from hf_lora.adapt.state import require_state
from hf_lora.adapt.walk import adapter_layers
from hf_lora.files.format import WEIGHTS_NAME
from hf_lora.files.load import load_adapter
from hf_lora.files.save import save_adapter
from hf_lora.layers.contract import FactorSpec, Shape
from hf_lora.train.optimizer import learning_rates

IDS = torch.arange(14).view(2, 7) % 32


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        self.doubled, self.negated, self.pair, self.plain = (
            Doubled(6, 8),
            Negated(8, 5),
            Pair(5, 7, 4),
            nn.Linear(4, 3),
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.negated(self.doubled(self.embed(ids)).tanh()).tanh()
        return self.plain(self.pair(x).tanh())


@pytest.fixture(autouse=True)
def entries() -> Iterator[None]:
    with registered():
        yield


TARGETS = ["doubled", "negated", "pair", "plain"]
WEIGHTS = ["doubled", "negated", "pair.first", "pair.second", "plain"]
ROWS = {"rows": {"embed": [1, 5]}}


def train(model: nn.Module, x: Tensor, steps: int = 5) -> tuple[float, float]:
    """(first, last) loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses[0], losses[-1]


def exact(base: Net, model: Net, ids: Tensor, name: str) -> Tensor:
    """The adapted net in float64, from the written formulas."""
    own = {path: tensor.detach().double() for path, tensor in model.named_parameters()}
    held = {path: tensor.detach().double() for path, tensor in base.named_parameters()}
    weights = {}
    for path, site in adapter_layers(model).items():
        module, _, weight = path.rpartition(".")
        holder, end = (f"{module}.", f"_{weight}") if module else (f"{weight}.", "")
        a, b = own[f"{holder}lora_A{end}.{name}.weight"], own[f"{holder}lora_B{end}.{name}.weight"]
        update = site._lora.adapters[name].scaling * (b @ a)
        gain = own.get(f"{holder}lora_gain{end}.{name}.weight")
        weights[path] = update if gain is None else gain[:, None] * update
        if f"{holder}lora_A0{end}.{name}.weight" in own:
            a, b = own[f"{holder}lora_A0{end}.{name}.weight"], own[f"{holder}lora_B0{end}.{name}.weight"]
            weights[path] -= site._lora.adapters[name].scaling * (b @ a)
        weights[path] += held[path if module else f"{path}.weight"] * (-1 if path == "negated" else 1)
    x = held["embed.weight"].clone()
    x[ROWS["rows"]["embed"]] = own[f"embed.lora_rows.{name}.weight"]
    x = (2 * F.linear(x[ids], weights["doubled"])).tanh()
    x = (2 * F.linear(x, weights["negated"])).tanh()
    x = F.linear(F.linear(x, weights["pair.first"]).tanh(), weights["pair.second"], held["pair.bias"]).tanh()
    return F.linear(x, weights["plain"], held["plain.bias"])


@pytest.mark.parametrize("init", ["constant", "top"])
@pytest.mark.parametrize("method", ["lora", "gain"])
def test_entries_of_every_kind_go_through_all_verbs(method: str, init: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    x = torch.arange(18).view(2, 9) % 9
    base, model = Net(), Net()
    config = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, method=method, init_lora_weights=init, parts=ROWS)
    counted = sum(t.parameters for t in explain_targets(model, config).layers) + 2 * 6
    inject(model, config)
    if init == "constant":
        assert torch.equal(model(x), base(x)), "a fresh adapter changes no bit"
        assert (model.plain.lora_A["default"].weight == 0.1).all()
    else:
        assert torch.allclose(model(x), base(x), rtol=1e-5, atol=1e-5)
        assert model.plain.lora_B["default"].weight.norm() > 0.1
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)
    first, last = train(model, x)
    assert last < first
    frozen = {n: p.clone() for n, p in model.named_parameters() if "lora_A0" in n or "lora_B0" in n}
    randomize(model, 5)
    model.load_state_dict(frozen, strict=False)
    assert torch.allclose(model(x).double(), exact(base, model, x, "default"), rtol=1e-5, atol=1e-5)

    save_adapter(model, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert saved.get("method", "lora") == method
    assert saved["init_lora_weights"] == (True if init == "constant" else init)
    again = Net()
    load_adapter(again, tmp_path / "saved")
    assert torch.equal(again(x), model(x))
    summary = inspect_adapter(tmp_path / "saved")
    assert summary.parameters == counted
    assert [layer.path for layer in summary.layers] == WEIGHTS
    assert summary.whole == {"embed.toy_rows.weight": 12}

    unmerged, weights = model(x), snapshot(model)
    merge(model)
    assert torch.allclose(model(x), unmerged, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert_same_tensors(snapshot(model), weights)
    assert torch.equal(model(x), unmerged)
    inject(model, LoraConfig(r=2, target_modules=["plain"]), "second")
    set_active(model, require_state(model, "test"), ("default",))
    delete(model, "second")
    assert torch.equal(model(x), unmerged)
    eject(model)
    assert torch.equal(model(x), base(x))
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert set(dict(model.named_parameters())) == set(dict(base.named_parameters()))


def test_a_method_with_a_third_factor_in_a_transformers_model(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    rows = {"rows": {"model.embed_tokens": [3, 7]}}
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], method="gain", parts=rows)
    model = apply_lora(type(tiny_llama()).from_pretrained(tmp_path / "base"), config)
    randomize(model).eval()
    unmerged = model(IDS).logits
    rates = learning_rates(model, 1.0, 4.0, None)
    assert {rates.get(id(p)) for n, p in model.named_parameters() if "lora_B" in n} == {4.0}
    assert not any(id(p) in rates for n, p in model.named_parameters() if "lora_gain" in n)
    model.save_pretrained(tmp_path / "adapter")
    loaded = LoraModel.from_pretrained(tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert torch.equal(loaded(IDS).logits, unmerged)
    loaded.load_adapter_weights(tmp_path / "adapter")
    with pytest.raises((KeyError, ValueError)):  # PEFT would overlook the third factor
        peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    by_file = type(tiny_llama()).from_pretrained(tmp_path / "merged").eval()
    by_memory = model.merge_and_unload()
    assert all(
        torch.equal(a, b) for a, b in zip(by_file.state_dict().values(), by_memory.state_dict().values(), strict=True)
    )
    assert torch.allclose(by_memory(IDS).logits, unmerged, rtol=1e-4, atol=1e-5)


def test_methods_that_do_not_add_up_cannot_act_together() -> None:
    model = Net()
    for name in ("one", "two"):
        inject(model, LoraConfig(r=2, target_modules=["plain"], method="gain"), name)
    with pytest.raises(Exception, match="methods gain cannot act on one layer together"):
        set_active(model, require_state(model, "test"), ("one", "two"))


def test_what_is_not_registered_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_lora(tiny_llama(), LoraConfig(method="gian", init_lora_weights="pisa"))
    assert "there is no method 'gian' (did you mean 'gain'" in str(caught.value)
    assert "there is no initialization 'pisa'" in str(caught.value)
    model = apply_lora(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], method="gain"))
    model.save_pretrained(tmp_path)
    del METHODS["gain"]
    for read in (inspect_adapter, lambda folder: load_adapter(tiny_llama(), folder)):
        with pytest.raises(AdapterFileError, match="there is no method 'gain'"):
            read(tmp_path)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ConfigError, match="the method 'lora' already exists"):
        register(METHODS, "lora", Gain())
    with pytest.raises(ConfigError, match="is not a valid name"):
        register(METHODS, "Not A Name", Gain())
    assert register(METHODS, "gain", METHODS["gain"]) is METHODS["gain"]


class FrozenGain(Gain):
    """The same with a third factor that nobody trains."""

    kind = "frozen_gain"

    def factors(self, layer: nn.Module, shape: Shape, r: int) -> dict[str, FactorSpec]:
        specs = super().factors(layer, shape, r)
        return {**specs, "lora_gain": dataclasses.replace(specs["lora_gain"], trainable=False)}


def test_a_frozen_factor_is_saved_and_never_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "frozen_gain", FrozenGain())
    model, config = Net(), LoraConfig(r=2, target_modules=["plain"], method="frozen_gain")
    inject(model, config)
    inject(model, LoraConfig(r=2, target_modules=["plain"]), "second")
    set_active(model, require_state(model, "test"), ("default",))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["plain.lora_A.default.weight", "plain.lora_B.default.weight"]
    assert sum(t.parameters for t in explain_targets(Net(), config).layers) == 2 * 4 + 3 * 2
    with torch.no_grad():
        model.plain.lora_gain["default"].weight.mul_(3)
    train(model, torch.arange(4))
    assert (model.plain.lora_gain["default"].weight == 3).all()
    save_adapter(model, tmp_path)
    again = Net()
    load_adapter(again, tmp_path, is_trainable=True)
    assert (again.plain.lora_gain["default"].weight == 3).all()
    assert not again.plain.lora_gain["default"].weight.requires_grad


def test_a_factor_that_nobody_declared_is_told_as_one(tmp_path: Path) -> None:
    model = Net()
    inject(model, LoraConfig(r=2, target_modules=["plain"]))
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.plain.lora_magnitude.weight": torch.ones(3)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(AdapterFileError, match=r"plain must have exactly lora_A and lora_B"):
        inspect_adapter(tmp_path)
    with pytest.raises(AdapterFileError, match=r"unexpected: .*lora_magnitude"):
        load_adapter(Net(), tmp_path)


def test_a_method_may_add_to_the_bias_too(tmp_path: Path) -> None:
    torch.manual_seed(4)
    x = torch.randn(5, 6)
    base, model = nn.Sequential(nn.Linear(6, 8)), nn.Sequential(nn.Linear(6, 8))
    model.load_state_dict(base.state_dict())
    for name, r in (("one", 2), ("two", 3)):
        inject(model, LoraConfig(r=r, target_modules=["0"], method="shift", bias="none" if r == 2 else "all"), name)
        assert torch.equal(model(x), base(x))
    randomize(model)
    set_active(model, require_state(model, "test"), ("one", "two"))
    weight, bias = base[0].weight.double(), model[0].lora_bias["two"].weight.double()
    for name, own in model[0]._lora.adapters.items():
        factors = {kind: factor.weight.double() for kind, factor in model[0].factors(name)}
        weight = weight + own.scaling * factors["lora_B"] @ factors["lora_A"]
        bias = bias + own.scaling * factors["lora_shift"]
    expected = F.linear(x.double(), weight, bias)
    assert_near(model(x), expected, torch.float32)
    before = snapshot(model)
    assert check_adapter(model, {"input": x}).ok
    merge(model)
    assert_near(model[0].weight, weight, torch.float32, 1)
    assert_near(model[0].bias, bias, torch.float32, 1)
    assert_near(model(x), expected, torch.float32)
    unmerge(model)
    assert_same_tensors(snapshot(model), before)
    without = nn.Sequential(nn.Linear(6, 8, bias=False))
    inject(without, LoraConfig(r=2, target_modules=["0"], method="shift"))
    with pytest.raises(MergeError, match="it has no bias"):
        merge(without)


def test_pieces_of_one_stored_tensor_are_sites(tmp_path: Path) -> None:
    torch.manual_seed(5)
    x = torch.randn(4, 6)
    base, model = nn.Sequential(Stack(6)), nn.Sequential(Stack(6))
    model.load_state_dict(base.state_dict())
    for name in ("one", "two"):
        inject(model, LoraConfig(r=2, target_modules=["0"]), name)
        assert torch.equal(model(x), base(x))
    randomize(model)
    set_active(model, require_state(model, "test"), ("one", "two"))
    weights = []
    for site in adapter_layers(model).values():
        w = site.weight.detach().double()
        for name, own in site._lora.adapters.items():
            w = w + own.scaling * site.factor("lora_B", name).double() @ site.factor("lora_A", name).double()
        weights.append(w)
    expected = F.linear(F.linear(x.double(), weights[0]).tanh(), weights[1]).tanh()
    assert_near(model(x), expected, torch.float32)
    before = snapshot(model)
    assert check_adapter(model, {"input": x}).ok
    merge(model)
    assert_near(model[0].stacked, torch.stack(weights), torch.float32, 1)
    unmerge(model)
    assert_same_tensors(snapshot(model), before)
    save_adapter(model, tmp_path, "two")
    again = nn.Sequential(Stack(6))
    again.load_state_dict(base.state_dict())
    load_adapter(again, tmp_path)
    set_active(model, require_state(model, "test"), ("two",))
    assert torch.equal(again(x), model(x))
    eject(model)
    assert_same_tensors(snapshot(model), snapshot(base))


def test_a_further_factor_grows_with_the_vocabulary(tmp_path: Path) -> None:
    model = apply_lora(tiny_llama(), LoraConfig(r=3, target_modules=["lm_head"], method="gain"))
    randomize(model).eval()
    before = model(IDS).logits
    base = tiny_llama().eval()
    model.resize_token_embeddings(80, mean_resizing=False)
    base.resize_token_embeddings(80, mean_resizing=False)
    after = model(IDS).logits
    assert torch.equal(after[..., : before.shape[-1]], before)
    assert torch.equal(model.lm_head.lora_gain["default"].weight[64:], torch.ones(16))  # as a new adapter's
    assert after[..., 64:].abs().max() > 0
    model.save_pretrained(tmp_path)
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    load_adapter(base, tmp_path)
    assert torch.equal(base(IDS).logits, after)


def test_no_weight_but_one_fits_what_does_not_add_up(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = apply_lora(type(tiny_llama()).from_pretrained(tmp_path / "base"), LoraConfig(r=2, method="gain"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="its weight must be 1"):
        LoraModel.from_pretrained(tmp_path / "adapter", base_model=str(tmp_path / "base"), merge=True, weights=[0.5])

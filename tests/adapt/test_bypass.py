"""Layers whose parent multiplies by their weight: skipped by the preset, refused when named, found by a check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_tensors, batch_for, randomize, snapshot, tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor, nn

from hf_lora import LoraConfig, StateError, TargetError, apply_lora, check_adapter, explain_targets
from hf_lora.adapt.bypass import bypassed_modules
from hf_lora.adapt.inject import inject
from hf_lora.adapt.walk import adapter_layers


class Attends(nn.Module):
    """Holds modules of PyTorch that bypass their children."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.attention(x, x, x)[0]))


def tiny_mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1, expand=2, time_step_rank=4, conv_kernel=4
    )
    return MambaForCausalLM(config).eval()


def tiny_wavlm() -> Any:
    from transformers import WavLMConfig, WavLMModel

    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_buckets=8, max_bucket_distance=16,
    )  # fmt: skip
    return WavLMModel(config).eval()


CASES = [
    (Attends, ["attention.out_proj", "block.self_attn.out_proj", "block.linear1", "block.linear2"], "out_proj"),
    (tiny_mamba, ["backbone.layers.0.mixer.dt_proj"], "dt_proj"),
    (tiny_wavlm, [f"encoder.layers.0.attention.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")], "q_proj"),
]


@pytest.mark.parametrize(("make", "bypassed", "named"), CASES, ids=["torch", "mamba", "wavlm"])
def test_bypassed_children_are_skipped_and_refused_when_named(make: Any, bypassed: list[str], named: str) -> None:
    torch.manual_seed(0)
    model = make()
    plan = explain_targets(model)
    for name in bypassed:
        assert "multiplies by its weight directly" in plan.skipped[name], name
    assert plan.layers
    assert not {t.name for t in plan.layers} & set(bypassed)
    with pytest.raises(TargetError) as error:
        apply_lora(model, LoraConfig(target_modules=[named]))
    assert "multiplies by its weight directly" in str(error.value)
    assert "allow_bypassed=True" in str(error.value)
    assert not adapter_layers(model)
    apply_lora(model, LoraConfig(target_modules=[named]), allow_bypassed=True)
    assert any(name.endswith(named) for name in adapter_layers(model))


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama, tiny_gpt2], ids=["bert", "llama", "gpt2"])
def test_no_false_alarm_on_common_models(make: Any) -> None:
    assert not [why for why in explain_targets(make()).skipped.values() if "multiplies" in why]


class Multiplies(nn.Module):
    """Uses the weight of one child under another name, which no reading of the source finds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.seen = nn.Linear(8, 8)
        self.idle = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        child = self.inner
        return self.seen(F.linear(x, child.weight, child.bias))


class Direct(Multiplies):
    def forward(self, x: Tensor) -> Tensor:
        return self.seen(F.linear(x, self.inner.weight))


@pytest.mark.parametrize("cls", [Multiplies, Direct])
def test_the_check_finds_a_real_bypass_and_names_it(cls: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), cls()).eval()
    targets = LoraConfig(r=4, target_modules=["0", "inner", "seen", "idle"])
    inject(model, targets, "default", allow_bypassed=True)
    randomize(model)
    before = snapshot(model)
    report = check_adapter(model, {"input": torch.randn(5, 8)})
    assert list(report.faulty) == ["1.inner"]
    assert report.never_called == ["1.inner", "1.idle"]
    assert not report.ok
    assert report.error > 0.01
    assert "differs: 1.inner" in str(report)
    assert_same_tensors(snapshot(model), before)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [tiny_bert, tiny_llama, tiny_gpt2], ids=["bert", "llama", "gpt2"])
def test_the_check_is_silent_on_a_clean_model(make: Any, dtype: torch.dtype, training: bool) -> None:
    model = randomize(apply_lora(make().to(dtype), LoraConfig(r=4, lora_dropout=0.2), "default"), scale=0.1)
    model.train(training)
    before, modes = snapshot(model), {n: m.training for n, m in model.named_modules()}
    y = model.eval()(**batch_for(model)).logits
    model.train(training)
    report = check_adapter(model, batch_for(model))
    assert report.ok, str(report)
    assert not report.never_called
    assert report.effect > 0.05
    assert report.error < 1e-4
    assert_same_tensors(snapshot(model), before)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert torch.equal(model.eval()(**batch_for(model)).logits, y)


def test_the_check_finds_mambas_bypass() -> None:
    torch.manual_seed(0)
    model = tiny_mamba()
    apply_lora(model, LoraConfig(r=4, target_modules=["dt_proj", "x_proj"]), allow_bypassed=True)
    randomize(model)
    report = check_adapter(model, {"input_ids": torch.randint(0, 64, (2, 8))})
    assert "backbone.layers.0.mixer.dt_proj" in report.faulty


def test_the_check_needs_an_active_unmerged_adapter() -> None:
    model = tiny_llama()
    with pytest.raises(StateError, match="has no adapters"):
        check_adapter(model, batch_for(model))
    apply_lora(model)
    model.set_adapter([])
    with pytest.raises(StateError, match="no adapter is active"):
        check_adapter(model, batch_for(model))
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(StateError, match="merged"):
        check_adapter(model, batch_for(model))


def test_an_error_in_the_batch_restores_the_model() -> None:
    model = randomize(apply_lora(tiny_llama().to(torch.bfloat16)))
    before = snapshot(model)
    with pytest.raises(ValueError, match="input_ids"):
        check_adapter(model, {"no_such_argument": 1})
    assert_same_tensors(snapshot(model), before)


class TwoSteps(nn.Linear):
    """A linear layer whose class spells its product out."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Clipped(nn.Linear):
    """A linear layer with bounds that ordinary inputs do not reach."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("bound", torch.tensor(1e6))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp(-self.bound, self.bound))


class Scaled(nn.Linear):
    """A linear layer with a forward that is not W x + b."""

    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * super().forward(input)


def test_a_subclass_is_adapted_only_if_its_own_forward_is_the_known_one() -> None:
    model = nn.Sequential(TwoSteps(8, 8), Clipped(8, 8), Scaled(8, 8))
    plan = explain_targets(model)
    assert [target.name for target in plan.layers] == ["0"]
    assert set(plan.skipped) == {"1", "2"}
    with pytest.raises(TargetError, match=r"(?s)1: Clipped is not a supported kind of layer.*2: Scaled"):
        apply_lora(model, LoraConfig(target_modules=["1", "2"]))


# What the source proves ----------------------------------------------------------------------------------------------


def tiny_deberta() -> Any:
    from transformers import DebertaConfig, DebertaForSequenceClassification

    config = DebertaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        relative_attention=True, pos_att_type="c2p|p2c", pooler_hidden_size=16,
    )  # fmt: skip
    return DebertaForSequenceClassification(config).eval()


def tiny_bloom(**values: Any) -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2, **values)).eval()


@pytest.mark.parametrize("make", [tiny_deberta, tiny_bloom], ids=["deberta", "bloom"])
def test_a_product_that_this_model_never_computes_is_not_a_bypass(make: Any) -> None:
    model = randomize(apply_lora(make(), LoraConfig(r=4)))
    assert not [why for why in explain_targets(make()).skipped.values() if "multiplies" in why]
    for training in (False, True):
        report = check_adapter(model.train(training), {"input_ids": torch.randint(0, 64, (2, 8))})
        assert report.ok, str(report)
        assert not report.never_called


def test_the_same_product_is_one_where_a_model_computes_it() -> None:
    bloom = explain_targets(tiny_bloom(pretraining_tp=2, slow_but_exact=True)).skipped
    assert set(bloom) == {"transformer.h.0.self_attention.dense", "transformer.h.0.mlp.dense_4h_to_h"}
    model = tiny_deberta()
    model.deberta.z_steps = 2  # then its encoder gives its layers other queries
    assert set(explain_targets(model).skipped) == {"deberta.encoder.layer.0.attention.self.in_proj"}


class Chooses(nn.Module):
    """Calls its child or multiplies by its weight."""

    def __init__(self, mode: int = 0, limit: float | None = None) -> None:
        super().__init__()
        self.mode, self.limit, self.inner = mode, limit, nn.Linear(4, 4)


class ByMode(Chooses):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.mode != 1 and not self.limit else F.linear(x, self.inner.weight)


class ByTraining(Chooses):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.limit is None:
            return F.linear(x, self.inner.weight)
        return self.inner(x)


class ByCaller(Chooses):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return self.inner(x)
        return F.linear(x, self.inner.weight) * mask


class Around(nn.Module):
    """Gives its child an optional argument, or passes its own on."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child


class PassesOn(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)

    def inside(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.child(x, mask=mask)
        return y


class Gives(PassesOn):
    def inside(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            mask = torch.ones(4)
        y: Tensor = self.child(x, mask=mask)
        return y


@pytest.mark.parametrize(
    ("model", "bypassed"),
    [
        (ByMode(), False), (ByMode(1), True), (ByMode(0, 2.0), True), (ByMode(2), False), (ByTraining(), True),
        (ByTraining(0, 1.0), False), (ByCaller(), True), (PassesOn(ByCaller()), False), (Gives(ByCaller()), True),
        (nn.Sequential(ByCaller()), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)  # fmt: skip
def test_a_condition_counts_if_this_model_can_meet_it(model: nn.Module, bypassed: bool) -> None:
    whole = nn.ModuleDict({"part": model, "other": nn.Linear(4, 4)}) if not isinstance(model, ByCaller) else model
    names = [name for name, module in whole.named_modules() if name.endswith("inner")]
    assert [name for name in names if name in bypassed_modules(whole)] == (names if bypassed else [])

"""`trainable_token_indices`: the chosen rows of an embedding, and of all that shares its weight, are the adapter's."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from helpers import assert_near, assert_same_tensors, backward, relative_error, snapshot, tiny_llama
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

from hf_lora import LoraConfig, LoraModel, StateError, TargetError, apply_lora, explain_targets, merge_files
from hf_lora.adapt.inject import inject
from hf_lora.files.format import WEIGHTS_NAME

TOKENS = [9, 3, 60]
ENDS = ("model.embed_tokens", "lm_head")
KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
BATCH = {
    "input_ids": torch.tensor([[1, 3, 5, 60, 9], [7, 9, 9, 2, 3]]),
    "labels": torch.tensor([[1, 3, 5, 60, 9]] * 2),
}


def config(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": TOKENS, **more})


def train(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def rows(model: Any, name: str = "default") -> nn.Parameter:
    found: nn.Parameter = model.get_input_embeddings().lora_token_rows[name].weight
    return found


def reference(tied: bool, model: Any) -> Any:
    """A plain model in float64 with the rows in its weights, and the update of the only adapted layers."""
    plain = tiny_llama(tied=tied).double()
    with torch.no_grad():
        plain.model.embed_tokens.weight[TOKENS] = rows(model).double()
        for ours, layer in zip(model.model.layers, plain.model.layers, strict=True):
            q = ours.self_attn.q_proj
            layer.self_attn.q_proj.weight += 2 * (q.lora_B["default"].weight @ q.lora_A["default"].weight).double()
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_that_with_these_rows(tied: bool, dtype: torch.dtype) -> None:
    base = tiny_llama(tied=tied).to(dtype)
    before = snapshot(base)
    model = apply_lora(tiny_llama(tied=tied).to(dtype), config())
    with torch.no_grad():
        expected = base(**BATCH).logits
        assert torch.equal(model(**BATCH).logits, expected), "a new adapter changes no bit"
        train(model)
        found, wanted = model(**BATCH).logits, reference(tied, model)(**BATCH).logits
        assert relative_error(found, wanted) < 32 * torch.finfo(dtype).eps
        assert relative_error(expected, wanted) > 0.05
        with model.disable_adapter():
            assert torch.equal(model(**BATCH).logits, expected)
        model.merge_adapter()
        assert relative_error(model(**BATCH).logits, wanted) < 32 * torch.finfo(dtype).eps
        weight = model.get_input_embeddings().weight
        assert torch.equal(weight[TOKENS], rows(model).to(dtype))
        assert (model.lm_head.weight is weight) == tied
        model.unmerge_adapter()
        assert torch.equal(model(**BATCH).logits, found)
    assert_same_tensors(snapshot(model.unload()), before)


def test_what_inference_cached_serves_training() -> None:
    model = apply_lora(tiny_llama(tied=True), config())
    with torch.inference_mode():
        model(**BATCH)
    assert any("token_rows" in name for name in backward(model, BATCH))


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_the_rows(tied: bool) -> None:
    model = apply_lora(tiny_llama(tied=tied), config())
    train(model)
    plain = reference(tied, model)
    found = backward(model, BATCH)
    plain(**BATCH).loss.backward()
    (name,) = (n for n in found if "token_rows" in n)
    assert_near(found[name], plain.model.embed_tokens.weight.grad[TOKENS], torch.float32, 64)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 32 + 2 * 2 * (32 + 32)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(30, 8, padding_idx=3),
        BartScaledWordEmbedding(30, 8, 1, embed_scale=2.5),
        nn.Linear(8, 30),
        nn.Linear(8, 30, bias=False),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("adapted", [False, True])
def test_kinds_of_layers(layer: Any, adapted: bool) -> None:
    torch.manual_seed(0)
    x = torch.randint(30, (4, 5)) if isinstance(layer, nn.Embedding) else torch.randn(4, 5, 8)
    model: Any = nn.ModuleDict({"layer": copy.deepcopy(layer), "other": nn.Linear(8, 8)}).requires_grad_(False)
    targets = ["layer", "other"] if adapted else ["other"]
    inject(model, LoraConfig(r=2, target_modules=targets, trainable_token_indices={"layer": [7, 3]}))
    assert_near(model["layer"](x), layer(x), torch.float32, 1)
    train(model)
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        if adapted:
            a, b = (getattr(model["layer"], kind)["default"].weight for kind in ("lora_A", "lora_B"))
            plain.weight += 2 * (b @ a if isinstance(layer, nn.Linear) else (b @ a).t())
        plain.weight[[7, 3]] = model["layer"].lora_token_rows["default"].weight
        assert_near(model["layer"](x), plain(x), torch.float32, 8)
    assert relative_error(layer(x), plain(x)) > 1e-3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [TOKENS, {"embed_tokens": TOKENS}, {"model.embed_tokens": sorted(TOKENS)}])
def test_files_of_both_libraries(tied: bool, tokens: Any, tmp_path: Path) -> None:
    base = tiny_llama(tied=tied)
    model = train(apply_lora(copy.deepcopy(base), config(trainable_token_indices=tokens))).eval()
    model.save_pretrained(tmp_path / "ours")  # type: ignore[operator]
    assert load_file(tmp_path / "ours" / WEIGHTS_NAME)[KEY].shape == (3, 32)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    settings = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj"], trainable_token_indices=tokens, task_type="CAUSAL_LM"
    )
    foreign = train(peft.get_peft_model(copy.deepcopy(base), settings)).eval()
    with torch.no_grad():
        for name, parameter in foreign.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 0.2
    foreign.save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    ours = LoraModel.from_pretrained(tmp_path / "theirs", base_model=copy.deepcopy(base))
    with torch.no_grad():
        for found, wanted in ((theirs, model), (ours, foreign)):
            assert_near(found(**BATCH).logits, wanted(**BATCH).logits, torch.float32, 16)
            assert relative_error(base(**BATCH).logits, wanted(**BATCH).logits) > 0.05


def test_tied_rows_stay_one_tensor(tmp_path: Path) -> None:
    """In every dtype, when moved, copied and trained; they count once."""
    model = apply_lora(tiny_llama(tied=True).to(torch.bfloat16), config())
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.float16).bfloat16()):
        ends = one.model.embed_tokens, one.lm_head
        assert ends[0].lora_token_rows["default"].weight is ends[1].lora_token_rows["default"].weight
        assert rows(one).dtype == torch.float32
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        model(**BATCH).loss.backward()
        optimizer.step()
    assert model.lm_head.lora_token_rows["default"].weight is rows(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        assert relative_error(rows(model), model.model.embed_tokens.weight[TOKENS]) > 0.01
        before = model.eval()(**BATCH).logits
        model.save_pretrained(tmp_path)
        again = LoraModel.from_pretrained(tmp_path, base_model=tiny_llama(tied=True).to(torch.bfloat16))
        assert torch.equal(again(**BATCH).logits, before)


def test_two_adapters_have_rows_of_their_own() -> None:
    model = apply_lora(tiny_llama(tied=True), config())
    for name, tokens in (("other", [4, 5]), ("third", [5, 9])):
        model.add_adapter(name, config(trainable_token_indices=tokens))
    train(model)
    model.set_adapter(["default", "other"])
    with torch.no_grad():
        found = model.get_input_embeddings()(torch.arange(64))
        base = model.get_input_embeddings().weight
        expected = base.clone()
        expected[TOKENS], expected[[4, 5]] = rows(model), rows(model, "other")
        assert torch.equal(found, expected)
    with pytest.raises(StateError, match=r"embed_tokens: 'default' and 'third' have rows of the same tokens"):
        model.set_adapter(["default", "third"])
    unloaded = copy.deepcopy(model).unload()
    model.delete_adapter("default")
    model.delete_adapter(["other", "third"])
    for plain in (model, unloaded):
        assert not any("lora" in name for name, _ in plain.named_modules())


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_are_all_that_a_file_needs(tied: bool, tmp_path: Path) -> None:
    """Tokens are added for training; a loader has the base without them."""
    tiny_llama(tied=tied).save_pretrained(tmp_path / "base")
    base: Any = type(tiny_llama())
    model = base.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(67)
    with pytest.raises(TargetError, match="67 rows, 64 in the base checkpoint") as refused:
        apply_lora(model, config(trainable_token_indices=[64, 66]))
    (advised,) = re.findall(r"trainable_token_indices=(\{.*?\})", str(refused.value))
    tokens = eval(advised)
    assert tokens == ({"model.embed_tokens": [64, 65, 66]} if tied else {end: [64, 65, 66] for end in ENDS})
    model = train(apply_lora(model, config(trainable_token_indices=tokens))).eval()
    batch = {"input_ids": torch.tensor([[1, 64, 5, 66, 65]])}
    model.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    assert (tmp_path / "adapter" / WEIGHTS_NAME).stat().st_size < 8000
    with torch.no_grad():
        expected = model(**batch).logits
        for merge in (False, True):
            again = LoraModel.from_pretrained(tmp_path / "adapter", merge=merge)
            assert again.config.vocab_size == 67
            assert_near(again(**batch).logits, expected, torch.float32, 16)


def test_a_vocabulary_grows_beside_trained_rows_and_does_not_lose_them() -> None:
    model = train(apply_lora(tiny_llama(tied=True), config())).eval()
    with torch.no_grad():
        before = model(**BATCH).logits
        model.resize_token_embeddings(80)  # type: ignore[operator]
        assert torch.equal(model(**BATCH).logits[..., :64], before)
        with pytest.raises(StateError, match="trains rows that the vocabulary would lose"):
            model.resize_token_embeddings(50)  # type: ignore[operator]
        assert torch.equal(model(**BATCH).logits[..., :64], before)


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        ([64], r"embed_tokens has 64 rows, and so no tokens \[64\]"),
        ({"embed_tokens": []}, "at least one token"),
        ({"embed": [3]}, "'embed' matches no module"),
        ({"norm": [3]}, "is not an embedding or linear layer"),
    ],
)
def test_what_has_no_such_rows_is_refused(tokens: Any, match: str) -> None:
    model = tiny_llama(tied=True)
    before = snapshot(model)
    with pytest.raises(TargetError, match=match):
        apply_lora(model, config(trainable_token_indices=tokens))
    assert_same_tensors(snapshot(model), before)


def test_a_module_that_is_trained_whole_has_no_rows_beside() -> None:
    with pytest.raises(TargetError, match=r"model\.embed_tokens is trained whole, so nothing else"):
        apply_lora(tiny_llama(), config(modules_to_save=["embed_tokens"]))
    assert "note: model.embed_tokens: the rows of 3 tokens are trained" in str(explain_targets(tiny_llama(), config()))
    model = train(apply_lora(tiny_llama(tied=True), config(modules_to_save=["lm_head"])))
    with torch.no_grad():
        embedded = model.model.embed_tokens(torch.tensor(TOKENS))
        assert torch.equal(embedded, rows(model))
        hidden = model.model(BATCH["input_ids"]).last_hidden_state
        assert_near(model(**BATCH).logits, hidden @ model.lm_head.copies["default"].weight.t(), torch.float32, 4)


class Reader(nn.Module):
    """It multiplies by the weight of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.embed(x), self.embed.weight)


def test_a_weight_that_its_parent_reads_is_refused() -> None:
    rows = LoraConfig(r=2, target_modules=["other"], trainable_token_indices={"embed": [3]})
    with pytest.raises(TargetError, match=r"read\.embed: Reader multiplies by its weight directly"):
        inject(nn.ModuleDict({"read": Reader(), "other": nn.Linear(8, 8)}), rows)
    inject(nn.ModuleDict({"read": Reader(), "other": nn.Linear(8, 8)}), rows, allow_bypassed=True)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_base(tied: bool, before: bool, tmp_path: Path) -> None:
    """Its tied weights are different objects."""
    model = train(apply_lora(tiny_llama(tied=tied), config())).eval()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    base = tiny_llama(tied=tied)
    if before:
        cpu_offload(base)
    again = LoraModel.from_pretrained(tmp_path, base_model=base)
    if not before:
        cpu_offload(again)
    with torch.no_grad():
        assert_near(again(**BATCH).logits, model(**BATCH).logits, torch.float32, 4)


@pytest.mark.parametrize("tied", [False, True])
def test_merging_by_files(tied: bool, tmp_path: Path) -> None:
    base: Any = tiny_llama(tied=tied)
    base.save_pretrained(tmp_path / "base")
    model = train(apply_lora(type(base).from_pretrained(tmp_path / "base"), config())).eval()
    model.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    with torch.no_grad():
        expected = model(**BATCH).logits
        assert_near(type(base).from_pretrained(tmp_path / "merged")(**BATCH).logits, expected, torch.float32, 16)


def test_rows_of_a_head_alone(tmp_path: Path) -> None:
    model = train(apply_lora(tiny_llama(), config(trainable_token_indices={"lm_head": TOKENS}))).eval()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    again = LoraModel.from_pretrained(tmp_path, base_model=tiny_llama(), merge=True)
    found: list[Tensor] = [m(**BATCH).logits for m in (theirs, again)]
    for each in found:
        assert_near(each, model(**BATCH).logits, torch.float32, 16)

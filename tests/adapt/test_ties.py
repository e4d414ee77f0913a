"""Tied embeddings and resized vocabularies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import (
    VOCABULARY,
    assert_near,
    assert_same_tensors,
    backward,
    batch_for,
    randomize,
    snapshot,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_lora import AdapterFileError, LoraConfig, LoraModel, MergeError, StateError, apply_lora, check_adapter
from hf_lora.adapt.state import require_state
from hf_lora.adapt.walk import adapter_layers, replacements


def tied_llama(seed: int = 0) -> Any:
    return tiny_llama(seed, tied=True)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        batch = batch_for(model)
        return model(**batch).logits  # labels give T5 its decoder's input


def quiet_t5(seed: int = 0) -> Any:
    return tiny_t5(seed, tie_word_embeddings=True)


TIED: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "llama-embedding": (tied_llama, ["embed_tokens"]),
    "llama-head": (tied_llama, ["lm_head"]),
    "gpt2-embedding": (tiny_gpt2, ["wte"]),
    "t5-encoder": (quiet_t5, ["encoder.embed_tokens"]),
    "t5-head": (quiet_t5, ["lm_head"]),
}


@pytest.mark.parametrize("case", TIED)
def test_merging_one_side_of_a_tie_is_refused_with_the_two_ways_out(case: str) -> None:
    make, targets = TIED[case]
    model = randomize(apply_lora(make(), LoraConfig(r=4, target_modules=[*targets])))
    before, y = snapshot(model), logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError) as error:
            merge()
        message = str(error.value)
        assert "is tied to" in message
        assert "keep the adapter unmerged" in message
        assert "untie=True" in message
    assert_same_tensors(snapshot(model), before)
    assert torch.equal(logits(model), y)
    assert any("shares its weight with" in note for note in require_state(model, "test").adapters["default"].notes)


@pytest.mark.parametrize("case", TIED)
def test_untying_gives_the_right_result_and_survives_a_save(case: str, tmp_path: Path) -> None:
    make, targets = TIED[case]
    model = randomize(apply_lora(make(), LoraConfig(r=4, target_modules=[*targets])), scale=0.1)
    y = logits(model)
    assert not torch.allclose(y, logits(make()), atol=1e-2)
    plain = model.merge_and_unload(untie=True)
    assert_near(logits(plain), y, torch.float32, 64)
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(plain))
    plain.tie_weights()  # what loading, resizing and Trainer's saves call
    assert_near(logits(plain), y, torch.float32, 64)


@pytest.mark.parametrize("case", TIED)
def test_a_correct_adapter_on_one_side_of_a_tie_passes_the_check(case: str) -> None:
    make, targets = TIED[case]
    model = randomize(apply_lora(make(), LoraConfig(r=4, target_modules=[*targets])), scale=0.1)
    before, y = snapshot(model), logits(model)
    users = [id(p) for p in model.parameters()]
    report = check_adapter(model, batch_for(model))
    assert report.ok, str(report)
    assert report.effect > 1e-2
    assert report.error < 1e-4
    assert [id(p) for p in model.parameters()] == users
    assert_same_tensors(snapshot(model), before)
    assert torch.equal(logits(model), y)


def frozen_head(model: Any) -> Any:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_("head" not in name and "layers.0" not in name)
    return model


@pytest.mark.parametrize("end", ["unmerge", "unload"])
@pytest.mark.parametrize("prepare", [lambda model: model, frozen_head], ids=["trainable", "frozen"])
@pytest.mark.parametrize("case", TIED)
def test_nothing_is_left_of_an_untied_merge(case: str, prepare: Callable[[Any], Any], end: str) -> None:
    make, targets = TIED[case]
    model = prepare(make())
    others = ["q_proj"] if "llama" in case else []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    required = {n: p.requires_grad for n, p in parameters.items()}
    before, flags = snapshot(model), (model.config.tie_word_embeddings, dict(model.all_tied_weights_keys))
    randomize(apply_lora(model, LoraConfig(r=4, target_modules=[*targets, *others])))
    y, adapted = logits(model), {n: p.requires_grad for n, p in model.named_parameters()}
    model.merge_adapter(untie=True)
    assert not torch.equal(logits(model), y)
    if end == "unmerge":
        model.unmerge_adapter()
        assert torch.equal(logits(model), y)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == adapted
    model.unload()
    now = dict(model.named_parameters(remove_duplicate=False))
    assert {n: id(p) for n, p in now.items()} == {n: id(p) for n, p in parameters.items()}
    assert {n: p.requires_grad for n, p in now.items()} == required
    assert (model.config.tie_word_embeddings, dict(model.all_tied_weights_keys)) == flags
    assert_same_tensors(snapshot(model), before)


def test_an_untied_model_keeps_what_required_gradients() -> None:
    model = tied_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    randomize(apply_lora(model, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])))
    plain = model.merge_and_unload(untie=True)
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight
    assert not plain.lm_head.weight.requires_grad
    assert not plain.model.embed_tokens.weight.requires_grad


def test_untied_and_unmerged_is_the_base_again() -> None:
    model = randomize(apply_lora(tied_llama(), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])))
    y = logits(model)
    base = logits(tied_llama().requires_grad_(False))
    model.merge_adapter(untie=True)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_an_untied_model_merges_both() -> None:
    model = randomize(apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"])))
    y = logits(model)
    assert_near(logits(model.merge_and_unload()), y, torch.float32, 64)


def test_adapters_that_leave_a_tie_alone_merge_and_keep_it() -> None:
    model = randomize(apply_lora(tied_llama(), LoraConfig(r=4)))
    plain = model.merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.config.tie_word_embeddings


def test_a_tie_stays_through_apply_and_unload() -> None:
    model = apply_lora(tied_llama(), LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.unload()
    assert model.lm_head.weight is model.model.embed_tokens.weight


# Resizing ------------------------------------------------------------------------------------------------------------

MORE = VOCABULARY + 6
RESIZED = {
    "factors elsewhere": {"target_modules": ["q_proj"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on both": {"target_modules": ["embed_tokens", "lm_head"]},
    "embedding kept whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head kept whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both kept whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("rows", [MORE, VOCABULARY - 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", RESIZED)
def test_resizing_after_applying(kind: str, tied: bool, rows: int) -> None:
    config = LoraConfig(r=4, **RESIZED[kind])  # type: ignore[arg-type]
    model = randomize(apply_lora(tiny_llama(tied=tied), config))
    old, before = logits(model), snapshot(model)
    classes = {n: type(m) for n, m in model.named_modules()}
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    embedding = model.resize_token_embeddings(rows, mean_resizing=False)
    assert embedding is model.get_input_embeddings()
    common = min(rows, VOCABULARY)
    assert model.config.vocab_size == rows
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    batch = batch_for(model)
    batch = {k: v.clamp(max=common - 1) for k, v in batch.items()}
    with torch.no_grad():
        y = model(**batch).logits
    assert y.shape[-1] == rows
    if rows > VOCABULARY:
        assert torch.equal(y[..., :common], old[..., :common])
    gradients = backward(model, batch)
    assert gradients.keys() == {n for n, r in required.items() if r}
    for name, tensor in snapshot(model).items():  # the old rows are where they were
        part = tuple(slice(0, min(a, b)) for a, b in zip(tensor.shape, before[name].shape, strict=True))
        assert torch.equal(tensor[part], before[name][part]), name
    if tied and "kept whole" not in kind:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    with model.disable_adapter():
        model(**batch)
    plain = model.unload()
    assert type(plain) is type(tiny_llama())
    assert plain(**batch).logits.shape[-1] == rows
    assert not adapter_layers(plain)
    assert not replacements(plain)


@pytest.mark.parametrize("kind", RESIZED)
def test_resizing_before_applying(kind: str) -> None:
    model = tiny_llama()
    model.resize_token_embeddings(MORE, mean_resizing=False)
    randomize(apply_lora(model, LoraConfig(r=4, **RESIZED[kind])))  # type: ignore[arg-type]
    y = logits(model)
    assert y.shape[-1] == MORE
    plain = model.merge_and_unload()
    assert_near(logits(plain), y, torch.float32, 64)


@pytest.mark.parametrize("kind", RESIZED)
def test_a_resized_model_saves_and_loads(kind: str, tmp_path: Path) -> None:
    model = apply_lora(tiny_llama(), LoraConfig(r=4, **RESIZED[kind]))  # type: ignore[arg-type]
    model.resize_token_embeddings(MORE, mean_resizing=False)
    randomize(model)
    y = logits(model)
    model.save_pretrained(tmp_path)
    base = tiny_llama()
    base.resize_token_embeddings(MORE, mean_resizing=False)
    base.load_state_dict(model.unload().state_dict())
    loaded = LoraModel.from_pretrained(tmp_path, base_model=base, allow_other_base=True)
    assert torch.equal(logits(loaded), y)


def test_resizing_merges_and_trains_right_afterwards() -> None:
    model = randomize(apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"])))
    model.resize_token_embeddings(MORE)
    randomize(model)
    batch = {k: v.clone() for k, v in batch_for(model).items()}
    batch["input_ids"][0, :3] = MORE - 1  # a new token
    y = model(**batch).logits
    plain = model.merge_and_unload()
    assert_near(plain(**batch).logits, y, torch.float32, 64)


def test_resizing_with_two_adapters() -> None:
    model = apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]), "first")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    randomize(model)
    outputs = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        outputs[name] = logits(model)
    model.resize_token_embeddings(MORE, mean_resizing=False)
    for name in ("first", "second"):
        model.set_adapter(name)
        assert torch.equal(logits(model)[..., :VOCABULARY], outputs[name])
        backward(model, batch_for(model))


def test_resizing_while_merged_is_refused() -> None:
    model = apply_lora(tiny_llama())
    model.merge_adapter()
    with pytest.raises(StateError, match="merged"):
        model.resize_token_embeddings(MORE)


def test_resizing_a_model_with_four_names_for_one_embedding() -> None:
    model = randomize(apply_lora(quiet_t5(), LoraConfig(r=4, target_modules=["q"])))
    old = logits(model)
    model.resize_token_embeddings(MORE, mean_resizing=False)
    assert_near(logits(model)[..., :VOCABULARY], old, torch.float32)
    assert model.lm_head.weight is model.shared.weight is model.encoder.embed_tokens.weight
    model = randomize(apply_lora(quiet_t5(), LoraConfig(r=4, target_modules=["q", "encoder.embed_tokens"])))
    before = snapshot(model)
    with pytest.raises(StateError, match=r"share one weight[\s\S]*Resize the vocabulary before apply_lora"):
        model.resize_token_embeddings(MORE)
    assert_same_tensors(snapshot(model), before)


def test_resizing_does_not_join_an_embedding_that_is_trained_whole() -> None:
    model = apply_lora(quiet_t5(), LoraConfig(r=4, target_modules=["q"], modules_to_save=["encoder.embed_tokens"]))
    before = snapshot(randomize(model))
    with pytest.raises(StateError, match=r"share one weight[\s\S]*adapters of encoder.embed_tokens"):
        model.resize_token_embeddings(MORE)
    assert_same_tensors(snapshot(model), before)


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_an_adapter_of_embeddings_that_resizing_made_one_module(
    field: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A loaded base has them apart, and nothing calls the one that gives its name to the tensors in the file."""
    base = quiet_t5()
    base.resize_token_embeddings(MORE, mean_resizing=False)
    assert base.shared is base.encoder.embed_tokens is base.decoder.embed_tokens
    base.save_pretrained(tmp_path / "base")
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q"], "modules_to_save": []} | {field: ["shared"]}
    model = randomize(apply_lora(base, LoraConfig(**settings)))
    model.save_pretrained(tmp_path / "adapter")
    y = logits(model)
    loaded = LoraModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "base").eval()
    assert torch.equal(logits(loaded), y)
    separate = type(base).from_pretrained(tmp_path / "base").eval()
    plain, tensors = logits(separate), snapshot(separate)
    assert separate.shared is not separate.encoder.embed_tokens
    LoraModel.load_adapter(apply_lora(separate, LoraConfig(r=2, target_modules=["v"])), tmp_path / "adapter", "own")
    assert torch.equal(logits(separate), y)
    separate.unload()
    assert torch.equal(logits(separate), plain)
    assert_same_tensors(snapshot(separate), tensors)
    theirs = peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert_near(logits(theirs.eval()), y, torch.float32, 16)


def test_what_peft_trained_at_the_name_that_nothing_calls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = quiet_t5()
    base.resize_token_embeddings(MORE, mean_resizing=False)
    base.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q", "shared"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "adapter")
    loaded = LoraModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "base").eval()
    assert "shared has no effect, as in PEFT" in caplog.text
    fresh = type(base).from_pretrained(tmp_path / "base")
    assert_near(
        logits(loaded), logits(peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()), torch.float32, 16
    )


@pytest.mark.parametrize("targets", [["q", "shared"], ".*q|shared"])
def test_the_patterns_of_embeddings_that_resizing_made_one_module(targets: Any, tmp_path: Path) -> None:
    base = quiet_t5()
    base.resize_token_embeddings(MORE, mean_resizing=False)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=targets, rank_pattern={"shared": 2}, alpha_pattern={"shared": 7, "q": 3})
    model = randomize(apply_lora(base, config))
    model.save_pretrained(tmp_path / "adapter")
    fresh = type(base).from_pretrained(tmp_path / "base")
    assert_near(
        logits(peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()), logits(model), torch.float32, 16
    )
    loaded = LoraModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "base").eval()
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    configs = [json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("adapter", "again")]
    assert configs[0] | {"base_model_name_or_path": ""} == configs[1] | {"base_model_name_or_path": ""}
    tensors, first = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("again", "adapter"))
    assert_same_tensors(tensors, first)
    tensors["base_model.model.decoder.embed_tokens.lora_embedding_A"] += 1
    save_file(tensors, tmp_path / "again" / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match="which was the same module in training"):
        LoraModel.from_pretrained(tmp_path / "again", base_model=tmp_path / "base")


@pytest.mark.parametrize("rows", [[*range(VOCABULARY, MORE)], {"shared": [3, *range(VOCABULARY, MORE)]}])
def test_rows_of_joined_embeddings_do_not_make_them_targets(rows: Any, tmp_path: Path) -> None:
    """Resizing joined them; their rows are saved under the first name, and no other names are written."""
    base = quiet_t5()
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(MORE, mean_resizing=False)
    config = LoraConfig(r=4, target_modules=["q", "v"], trainable_token_indices=rows)
    model = randomize(apply_lora(base, config)).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert set(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]) == {"q", "v"}
    loaded = LoraModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "base").eval()
    assert_near(logits(loaded), logits(model), torch.float32, 16)


def test_embeddings_with_adapters_of_their_own_are_not_joined(tmp_path: Path) -> None:
    base = quiet_t5()
    base.resize_token_embeddings(MORE, mean_resizing=False)
    base.save_pretrained(tmp_path / "base")
    randomize(apply_lora(base, LoraConfig(r=4, target_modules=["shared"]))).save_pretrained(tmp_path / "adapter")
    other = randomize(
        apply_lora(
            type(base).from_pretrained(tmp_path / "base").eval(),
            LoraConfig(r=2, target_modules=["v"], modules_to_save=["encoder.embed_tokens"]),
        )
    )
    before, y = snapshot(other), logits(other)
    with pytest.raises(StateError, match=r"has adapters of encoder.embed_tokens, which would be lost"):
        other.load_adapter(tmp_path / "adapter", "own")
    assert_same_tensors(snapshot(other), before)
    assert torch.equal(logits(other), y)


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_keeps_the_trained_bias_of_a_head(tied: bool) -> None:
    model = apply_lora(tiny_bert(cls="BertForMaskedLM", tie_word_embeddings=tied), LoraConfig(r=4, bias="all"))
    randomize(model)
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    old, own = logits(model), set(model.get_adapter_state_dict())
    model.resize_token_embeddings(MORE, mean_resizing=False)
    y = logits(model)
    assert y.shape[-1] == MORE
    assert torch.equal(y[..., :VOCABULARY], old)
    assert set(model.get_adapter_state_dict()) == own
    found = {n: p.requires_grad for n, p in model.named_parameters()}
    assert found.items() <= required.items()  # transformers makes one of the two names of the head's bias
    plain = model.merge_and_unload()
    assert_near(logits(plain), y, torch.float32, 64)


def test_resizing_what_holds_the_head_and_is_kept_whole() -> None:
    config = LoraConfig(r=4, modules_to_save=["cls"])
    model = randomize(apply_lora(tiny_bert(cls="BertForMaskedLM"), config))
    old = logits(model)
    model.resize_token_embeddings(MORE, mean_resizing=False)
    assert logits(model).shape[-1] == MORE
    assert torch.equal(logits(model)[..., :VOCABULARY], old)
    with model.disable_adapter():
        assert logits(model).shape[-1] == MORE
    backward(model, batch_for(model))


@pytest.mark.parametrize("kept", [["embed_tokens"], ["lm_head"]])
def test_merging_a_tied_embedding_that_is_kept_whole_unties_what_is_saved(kept: list[str], tmp_path: Path) -> None:
    """The adapter trained one side of the tie alone, so the merged model's file must hold both."""
    model = randomize(apply_lora(tied_llama(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=kept)))
    y = logits(model)
    plain = model.merge_and_unload()
    assert_near(logits(plain), y, torch.float32, 64)
    plain.tie_weights()
    assert_near(logits(plain), y, torch.float32, 64)
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(plain))
    model = randomize(apply_lora(tied_llama(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=kept)))
    assert model.unload().lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tying_ties_the_weights_of_the_base_and_no_copy(dtype: torch.dtype) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = randomize(apply_lora(tied_llama().to(dtype), config))
    y, before = logits(model), snapshot(model)
    model.tie_weights()
    assert_same_tensors(snapshot(model), before)
    assert model.lm_head.weight is model.model.embed_tokens.base_layer.weight
    assert torch.equal(logits(model), y)
    assert model.active_adapters() == ["default"]

"""Modules that a model has at several places, and what a file means by the name of one of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import (
    VOCABULARY,
    assert_near,
    assert_same_tensors,
    batch_for,
    needs_peft,
    randomize,
    relative_error,
    snapshot,
    tiny_t5,
)
from round_trip import in_peft, output
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, BartForSequenceClassification

from hf_lora import AdapterFileError, LoraConfig, LoraModel, StateError, TargetError, apply_lora, merge_files
from hf_lora.files.format import CONFIG_NAME, EXTRAS_NAME, WEIGHTS_NAME
from hf_lora.files.load import load_adapter, load_adapter_weights
from hf_lora.files.save import save_adapter

MORE = VOCABULARY + 3
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))


class Twice(nn.Module):
    """The layers `a` and `b` are one module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = self.b = nn.Linear(4, 4)
        self.c = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return y


def trained(base: nn.Module, folder: Path, **config: Any) -> Path:
    """A file of PEFT with random values."""
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 2, **config}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["a", "c"]},
        {"target_modules": ["a", "b", "c"]},
        {"target_modules": ["c"], "modules_to_save": ["a"]},
        {"target_modules": ["c"], "modules_to_save": ["b"]},
        {"target_modules": ["c"], "modules_to_save": ["a", "b"]},
    ],
    ids=str,
)
def test_peft_adapts_a_module_at_the_name_in_the_file(config: dict[str, Any], tmp_path: Path) -> None:
    """At its other places the model has the plain module."""
    expected = output(in_peft(Twice(), trained(Twice(), tmp_path / "theirs", **config)), X)
    assert relative_error(expected, output(Twice(), X)) > 0.01
    model, again = Twice(), Twice()
    load_adapter(model, tmp_path / "theirs")
    assert_near(output(model, X), expected, torch.float32, 16)
    save_adapter(model, tmp_path / "ours")
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(output(again, X), output(model, X))
    assert_near(output(in_peft(Twice(), tmp_path / "ours"), X), expected, torch.float32, 16)


LORA_ONLY = pytest.param("lora_only", marks=needs_peft("0.20", "leaves this bias out of its file"))


@pytest.mark.parametrize("bias", ["all", LORA_ONLY])
def test_a_bias_that_acts_at_all_places_beside_factors_of_one_is_refused(bias: str, tmp_path: Path) -> None:
    """PEFT trains the parameter of the base, which all places have."""
    trained(Twice(), tmp_path, target_modules=["a"], bias=bias)
    model = Twice()
    with pytest.raises(
        AdapterFileError, match=r"trained base_model.model.a.base_layer.bias for all places of a module"
    ):
        load_adapter(model, tmp_path)
    assert model.a is model.b
    in_peft(model, tmp_path)  # the next step


def test_an_adapter_that_acts_at_all_places_does_so_again(tmp_path: Path) -> None:
    model, again = Twice(), Twice()
    apply_lora(model, LoraConfig(r=2, target_modules=["a"], rank_pattern={"a": 3}, modules_to_save=["c"]))
    with pytest.warns(UserWarning, match="PEFT uses this adapter in part: the model has a at several places"):
        save_adapter(randomize(model), tmp_path)
    load_adapter(again, tmp_path)
    assert again.a is again.b
    assert torch.equal(output(again, X), output(model, X))


def test_a_place_is_not_told_from_the_others_where_the_module_has_adapters(tmp_path: Path) -> None:
    trained(Twice(), tmp_path, target_modules=["a"])
    model = randomize(apply_lora(Twice(), LoraConfig(r=2, target_modules=["a"]), "first"))
    before, y = snapshot(model), output(model, X)
    with pytest.raises(StateError, match="has values for a alone, but the model has the same module at other names"):
        load_adapter(model, tmp_path, "second")
    assert_same_tensors(snapshot(model), before)
    assert torch.equal(output(model, X), y)
    load_adapter(Twice(), tmp_path, "second")  # the next step


# An embedding that nothing calls by its first name -----------------------------------------------------------------


def plain(seed: int = 0) -> Any:
    return tiny_t5(seed, tie_word_embeddings=True)


def joined(rows: int = VOCABULARY) -> Any:
    """As a script that resizes the vocabulary has it: its embeddings are one module."""
    model = plain()
    torch.manual_seed(3)
    model.resize_token_embeddings(rows, mean_resizing=False)
    assert model.shared is model.encoder.embed_tokens is model.decoder.embed_tokens
    return model


def logits(model: Any) -> Tensor:
    return output(model.eval(), batch_for(model))


BASES = {"plain": plain, "joined": joined, "grown": lambda: joined(MORE)}
UNCALLED = {
    "factors": {"target_modules": ["q", "shared"]},
    "a copy": {"target_modules": ["q"], "modules_to_save": ["shared"]},
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("part", UNCALLED)
def test_what_nothing_calls_is_left_out(
    part: str, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT did not train it. The file that is written of the rest means the same, here and in PEFT."""
    make = BASES[base]
    trained(make(), tmp_path / "theirs", **UNCALLED[part])
    expected = logits(in_peft(make(), tmp_path / "theirs"))
    model = LoraModel.from_pretrained(tmp_path / "theirs", base_model=make())
    assert "what the file has for shared has no effect, as in PEFT, and is left out" in caplog.text
    assert_near(logits(model), expected, torch.float32, 16)
    randomize(model, 5)
    load_adapter_weights(model, tmp_path / "theirs")
    assert_near(logits(model), expected, torch.float32, 16)
    model.save_pretrained(tmp_path / "ours")
    for other in (plain, joined) if base != "grown" else (make,):
        again = LoraModel.from_pretrained(tmp_path / "ours", base_model=other())
        assert_near(logits(again), expected, torch.float32, 16)
    assert_near(logits(in_peft(make(), tmp_path / "ours")), expected, torch.float32, 16)
    assert_near(logits(model.merge_and_unload()), expected, torch.float32, 64)


def test_a_file_of_nothing_else_is_refused(tmp_path: Path) -> None:
    trained(plain(), tmp_path, target_modules=["shared"])
    with pytest.raises(AdapterFileError, match=r"shared has no effect, as in PEFT, and it has nothing else: nothing"):
        LoraModel.from_pretrained(tmp_path, base_model=plain())


@pytest.mark.parametrize("base", ["joined", "grown"])
def test_names_of_one_module_are_told_apart(base: str, tmp_path: Path) -> None:
    """PEFT trains whole modules at each name; a file that was trained on a loaded base has factors for each."""
    make = BASES[base]
    trained(make(), tmp_path / "copies", target_modules=["q"], modules_to_save=["embed_tokens"])
    model = make()
    randomize(apply_lora(plain(), LoraConfig(r=2, target_modules=["q", "embed_tokens"]))).save_pretrained(
        tmp_path / "factors"
    )
    loaded = LoraModel.from_pretrained(tmp_path / "copies", base_model=model)
    expected = logits(in_peft(make(), tmp_path / "copies"))
    assert_near(logits(loaded), expected, torch.float32, 16)
    assert loaded.get_input_embeddings().weight is loaded.lm_head.weight
    loaded.save_pretrained(tmp_path / "ours")
    again = LoraModel.from_pretrained(tmp_path / "ours", base_model=make())
    assert torch.equal(logits(again), logits(loaded))
    assert_near(logits(in_peft(make(), tmp_path / "ours")), expected, torch.float32, 16)
    base_of_factors = make()
    if base == "joined":
        again = LoraModel.from_pretrained(tmp_path / "factors", base_model=base_of_factors)
        assert torch.equal(logits(again), logits(LoraModel.from_pretrained(tmp_path / "factors", base_model=plain())))
    else:
        with pytest.raises(AdapterFileError, match=r"shape: \S*encoder.embed_tokens.lora_embedding_A"):
            LoraModel.load_adapter(apply_lora(base_of_factors, LoraConfig(target_modules=["v"])), tmp_path / "factors")
        assert base_of_factors.shared is base_of_factors.encoder.embed_tokens, "an error leaves the model as it was"


def test_a_new_vocabulary_that_peft_saved_is_that_of_all_names(tmp_path: Path) -> None:
    """PEFT loads it into the weight of the base, of which this base has another."""
    plain().save_pretrained(tmp_path / "small")
    grown = type(plain()).from_pretrained(tmp_path / "small")
    grown.resize_token_embeddings(MORE, mean_resizing=False)
    trained(grown, tmp_path / "theirs", target_modules=["q"])
    assert "base_model.model.shared.weight" in load_file(tmp_path / "theirs" / WEIGHTS_NAME)
    other = plain()
    other.resize_token_embeddings(MORE, mean_resizing=False)
    other.save_pretrained(tmp_path / "other")

    def base() -> Any:
        return type(plain()).from_pretrained(tmp_path / "other").eval()

    ids = torch.tensor([[5, *range(VOCABULARY, MORE), 1]])
    batch = {"input_ids": ids, "labels": ids}
    expected = output(in_peft(base(), tmp_path / "theirs"), batch)
    for model in (base(), tmp_path / "small"):
        found = LoraModel.from_pretrained(tmp_path / "theirs", base_model=model).eval()
        assert_near(output(found, batch), expected, torch.float32, 16)


def test_a_joined_embedding_in_a_file_of_an_earlier_version(tmp_path: Path) -> None:
    """It had the tensors under the first name alone, and did not say that the module was one."""
    base = joined(MORE)
    base.save_pretrained(tmp_path / "base")
    model = randomize(apply_lora(base, LoraConfig(r=4, target_modules=["q", "shared"])))
    model.save_pretrained(tmp_path / "adapter")
    names = {"base_model.model.encoder.embed_tokens.": "base_model.model.shared."}
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_NAME)
    for name, first in names.items():
        tensors = {k.replace(name, first): t for k, t in tensors.items() if "decoder.embed_tokens" not in k}
    save_file(tensors, tmp_path / "adapter" / WEIGHTS_NAME, metadata={"format": "pt"})
    for file, change in ((CONFIG_NAME, {"target_modules": ["q", "shared"]}), (EXTRAS_NAME, {})):
        values = json.loads((tmp_path / "adapter" / file).read_text()) | change
        values.pop("joined", None)
        (tmp_path / "adapter" / file).write_text(json.dumps(values))
    loaded = LoraModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "base")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_a_second_name_of_a_module_is_answered_with_its_first(field: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q"], "modules_to_save": []}
    model = joined()
    with pytest.raises(TargetError, match=r"encoder.embed_tokens is the same module as shared here; name that"):
        apply_lora(
            model, LoraConfig(**settings | {field: ["q", "embed_tokens"] if "t" in field[0] else ["embed_tokens"]})
        )
    randomize(apply_lora(model, LoraConfig(**settings | {field: ["shared"]}))).save_pretrained(tmp_path)
    assert torch.equal(logits(LoraModel.from_pretrained(tmp_path, base_model=plain())), logits(model))


@pytest.mark.parametrize("base", ["plain", "joined"])
@pytest.mark.parametrize(
    "rows", [{"embed_tokens": [3, 6]}, {"decoder.embed_tokens": [3, 11], "lm_head": [3, 7]}], ids=str
)
def test_rows_of_each_name(rows: dict[str, list[int]], base: str, tmp_path: Path) -> None:
    """As for modules that are trained whole, PEFT takes every module whose name ends so."""
    make = BASES[base]
    trained(make(), tmp_path / "theirs", target_modules=["q"], trainable_token_indices=rows)
    expected = logits(in_peft(make(), tmp_path / "theirs"))
    model = LoraModel.from_pretrained(tmp_path / "theirs", base_model=make())
    assert_near(logits(model), expected, torch.float32, 16)
    model.save_pretrained(tmp_path / "ours")
    for other in (plain, joined):
        assert torch.equal(logits(LoraModel.from_pretrained(tmp_path / "ours", base_model=other())), logits(model))
        assert_near(logits(in_peft(other(), tmp_path / "ours")), expected, torch.float32, 16)
    assert_near(logits(model.merge_and_unload(untie=True)), expected, torch.float32, 64)


def test_a_name_that_matched_nothing_is_not_written_if_it_matches_in_a_loaded_base(tmp_path: Path) -> None:
    trained(joined(), tmp_path / "theirs", target_modules=["q", "decoder.embed_tokens"])
    assert not any("embed" in key for key in load_file(tmp_path / "theirs" / WEIGHTS_NAME))
    model = LoraModel.from_pretrained(tmp_path / "theirs", base_model=joined())
    model.save_pretrained(tmp_path / "ours")
    again = LoraModel.from_pretrained(tmp_path / "ours", base_model=plain())
    assert torch.equal(logits(again), logits(model))
    assert_near(logits(in_peft(plain(), tmp_path / "ours")), logits(model), torch.float32, 16)


def tiny_bart() -> Any:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32, init_std=0.2,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [plain, pytest.param(tiny_bart, marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", UNCALLED)
def test_a_joined_embedding_is_merged_under_all_its_names(part: str, make: Any, tmp_path: Path) -> None:
    """Its output layer is not tied to it any more, so a model that is loaded has no tie to fill the others from."""
    base = make()
    base.resize_token_embeddings(MORE, mean_resizing=False)
    base.save_pretrained(tmp_path / "base")
    query = "q_proj" if make is tiny_bart else "q"
    targets = [query, "shared"] if part == "factors" else [query]
    config = LoraConfig(r=4, target_modules=targets, modules_to_save=[] if part == "factors" else ["shared"])
    model = randomize(apply_lora(base, config))
    expected, untie = logits(model), part == "factors"
    model.save_pretrained(tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "files", untie=untie, progress=False)
    merged = model.merge_and_unload(untie=untie)
    assert_near(logits(merged), expected, torch.float32, 64)
    merged.save_pretrained(tmp_path / "memory")
    for folder in ("files", "memory"):
        assert_near(logits(type(make()).from_pretrained(tmp_path / folder)), expected, torch.float32, 64)


def test_rows_of_modules_that_peft_does_not_know_as_tied_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = BartForSequenceClassification(tiny_bart().config).eval()
    batch = {"input_ids": torch.tensor([[5, 3, 4, 2]])}
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 4])
    model = randomize(apply_lora(copy.deepcopy(base), config)).eval()
    expected = output(model, batch)
    with pytest.warns(UserWarning, match="PEFT uses this adapter in part: .* have the same rows of tokens"):
        model.save_pretrained(tmp_path)
    assert relative_error(output(in_peft(base, tmp_path), batch), expected) > 0.01
    assert torch.equal(output(LoraModel.from_pretrained(tmp_path, base_model=base).eval(), batch), expected)
    assert_near(output(model.merge_and_unload().eval(), batch), expected, torch.float32, 64)

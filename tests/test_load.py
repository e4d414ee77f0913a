"""`LoraModel.from_pretrained`, `load_adapter` and `pipeline`: the base found, the head rebuilt, nothing drawn."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, llama_adapter, logits, minilm
from helpers import assert_near, assert_same_tensors, drop_modules, randomize, snapshot, tiny_bert, tiny_llama
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertForSequenceClassification, BertModel

import hf_lora
from hf_lora import AdapterFileError, ConfigError, LoraConfig, LoraModel, StateError, apply_lora, merge_files
from hf_lora.files.format import CONFIG_NAME, EXTRAS_NAME, WEIGHTS_NAME


@pytest.fixture(scope="module", params=list(FAMILIES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(adapter's folder, the model that wrote it), over a base that lies in a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    base = FAMILIES[request.param]()
    base.save_pretrained(folder / "base")
    model = type(base).from_pretrained(folder / "base")
    targets = ["convolution"] if request.param == "resnet" else "all-linear"
    heads = ["classifier"] if "Classification" in type(base).__name__ else None
    randomize(apply_lora(model, LoraConfig(target_modules=targets, modules_to_save=heads))).eval()
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", model


def test_the_base_and_its_class_are_found(trained: tuple[Path, Any]) -> None:
    folder, model = trained
    loaded = LoraModel.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert isinstance(loaded, LoraModel)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(logits(loaded), logits(model))
    assert_same_tensors(snapshot(loaded), snapshot(model))


def test_merge_gives_the_plain_class(trained: tuple[Path, Any]) -> None:
    folder, model = trained
    merged = LoraModel.from_pretrained(folder, merge=True)
    assert type(merged) is type(copy.deepcopy(model).unload())
    assert not any("lora" in n or "copies" in n for n, _ in merged.named_modules())
    assert_near(logits(merged), logits(model), torch.float32, factor=64)


def test_trainable_and_loaded_twice(trained: tuple[Path, Any]) -> None:
    folder, _ = trained
    first, second = (LoraModel.from_pretrained(folder, is_trainable=True) for _ in range(2))
    assert first.training
    assert_same_tensors(snapshot(first), snapshot(second))
    learning = {n for n, p in first.named_parameters() if p.requires_grad}
    assert learning
    assert all("lora_" in n or ".copies." in n for n in learning)
    own = first.get_adapter_state_dict().values()
    assert len(learning) == sum(isinstance(t, torch.nn.Parameter) for t in own)


def test_the_random_numbers_are_left_alone(trained: tuple[Path, Any]) -> None:
    folder, _ = trained
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    LoraModel.from_pretrained(folder)
    assert torch.equal(torch.rand(4), expected)


def test_a_bf16_base_keeps_float32_adapters(trained: tuple[Path, Any]) -> None:
    folder, model = trained
    loaded = LoraModel.from_pretrained(folder, dtype=torch.bfloat16)
    own = loaded.get_adapter_state_dict()
    floating = [t for t in own.values() if t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.float32}
    expected = model.get_adapter_state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[key], expected[key]) for key in own)
    base = {p.dtype for n, p in loaded.named_parameters() if "lora_" not in n and ".copies." not in n}
    assert base == {torch.bfloat16}


def test_the_file_is_what_it_should_be(trained: tuple[Path, Any]) -> None:
    folder, model = trained
    assert {p.name for p in folder.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, EXTRAS_NAME}
    extras = json.loads((folder / EXTRAS_NAME).read_text())
    assert extras["architecture"] == type(model).__name__
    assert extras["base"]["model_type"] == model.config.model_type
    assert extras["num_labels"] == model.config.num_labels
    header = (folder / WEIGHTS_NAME).read_bytes()[8:4096]
    assert b'"__metadata__":{"format":"pt"}' in header
    size = sum(t.numel() * t.element_size() for t in model.get_adapter_state_dict().values())
    assert (folder / WEIGHTS_NAME).stat().st_size < size + 200 * len(model.get_adapter_state_dict()) + 4096


def test_saving_again_gives_the_same_bytes(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = trained
    LoraModel.from_pretrained(folder).save_pretrained(tmp_path)
    for name in (WEIGHTS_NAME, EXTRAS_NAME):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    read = [json.loads((f / CONFIG_NAME).read_text()) for f in (tmp_path, folder)]
    assert read[0] == read[1]


def test_a_half_precision_file_becomes_float32_masters(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = trained
    shutil.copytree(folder, tmp_path / "half")
    halves = {
        k: t.to(torch.bfloat16) if t.is_floating_point() else t for k, t in load_file(folder / WEIGHTS_NAME).items()
    }
    save_file(halves, tmp_path / "half" / WEIGHTS_NAME)
    loaded = LoraModel.from_pretrained(tmp_path / "half").get_adapter_state_dict()
    for key, tensor in loaded.items():
        assert tensor.dtype == (torch.float32 if tensor.is_floating_point() else halves[key].dtype)
        assert torch.equal(tensor, halves[key].to(tensor.dtype))


# Where the base comes from -------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return llama_adapter(tmp_path)


def test_a_base_given_as_a_model_or_a_path(adapter: Path) -> None:
    expected = logits(LoraModel.from_pretrained(adapter))
    base = tiny_llama()
    loaded = LoraModel.from_pretrained(str(adapter), base_model=base)
    assert loaded is base
    assert torch.equal(logits(loaded), expected)
    for path in (adapter.parent / "base", str(adapter.parent / "base")):
        assert torch.equal(logits(LoraModel.from_pretrained(adapter, base_model=path)), expected)


def test_a_base_that_is_named_nowhere_or_cannot_be_reached(tmp_path: Path) -> None:
    apply_lora(tiny_llama()).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="names no base model"):
        LoraModel.from_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="not a local folder"):
        LoraModel.from_pretrained("nobody/no-such-adapter")


def test_arguments_for_the_base_reach_it(adapter: Path) -> None:
    loaded = LoraModel.from_pretrained(adapter, attn_implementation="eager", use_cache=False, device_map="cpu")
    assert loaded.config._attn_implementation == "eager"
    assert loaded.config.use_cache is False


def test_the_class_has_no_constructor_and_a_model_s_own_class_loads_plain_ones(adapter: Path) -> None:
    with pytest.raises(StateError, match=r"from_pretrained\(adapter\)"):
        LoraModel()
    loaded = LoraModel.from_pretrained(adapter)
    again = type(loaded).from_pretrained(adapter.parent / "base")
    assert not isinstance(again, LoraModel)


# Several adapters ----------------------------------------------------------------------------------------------------


def test_several_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    model = apply_lora(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("one", LoraConfig(r=3, target_modules=["v_proj"]))
    model.add_adapter("two", LoraConfig(r=4, target_modules=["q_proj", "up_proj"], use_rslora=True))
    randomize(model)
    model.save_pretrained(tmp_path)
    assert {str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob(WEIGHTS_NAME)} == {".", "one", "two"}
    loaded = LoraModel.from_pretrained(tmp_path, base_model=tiny_llama())
    loaded.load_adapter(tmp_path / "one", "one")
    loaded = LoraModel.from_pretrained(tmp_path / "two", base_model=loaded, adapter_name="two")
    assert list(loaded.lora_configs) == ["default", "one", "two"]
    for names in (["default"], ["one"], ["two"], ["default", "one", "two"]):
        loaded.set_adapter(names)
        model.set_adapter(names)
        assert torch.equal(logits(loaded), logits(model))
    assert_same_tensors(snapshot(loaded), snapshot(model))


def test_an_adapters_name_does_not_change_its_file(tmp_path: Path) -> None:
    for name in ("default", "weight_lora_A"):
        model = randomize(apply_lora(tiny_llama(), LoraConfig(r=2), adapter_name=name))
        model.save_pretrained(tmp_path / name)
    for file in (WEIGHTS_NAME, CONFIG_NAME, EXTRAS_NAME):
        assert (tmp_path / "default" / file).read_bytes() == (tmp_path / "weight_lora_A" / file).read_bytes()


class Odd(torch.nn.Module):
    """Modules whose names look like parts of keys."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("lora_A", "weight", "default", "base_layer", "copies", "modules_to_save"):
            self.add_module(name, torch.nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._modules.values():
            assert layer is not None
            x = layer(x) + x
        return x


def test_modules_whose_names_look_like_keys(tmp_path: Path) -> None:
    from hf_lora.files.load import load_adapter
    from hf_lora.files.save import adapter_state_dict, save_adapter

    targets = ["lora_A", "weight", "default", "base_layer", "copies"]
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=["modules_to_save"])
    torch.manual_seed(0)
    base, x = Odd(), torch.randn(3, 4)
    model = apply_lora(copy.deepcopy(base), config)
    with torch.no_grad():
        for tensor in adapter_state_dict(model, "default").values():
            tensor.normal_()
    save_adapter(model, tmp_path)
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert not torch.equal(loaded(x), base(x))


def test_an_adapter_without_some_of_its_layers_is_saved_as_it_is(tmp_path: Path) -> None:
    """What a run dropped is in neither file, and PEFT finds the same layers."""
    from hf_lora.adapt.inject import drop_layers

    model = apply_lora(tiny_llama())
    drop_layers(model, "default", {"model.layers.1.mlp.down_proj"}, "never called")
    randomize(model).save_pretrained(tmp_path)
    assert torch.equal(logits(LoraModel.from_pretrained(tmp_path, base_model=tiny_llama())), logits(model))
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert_near(logits(theirs.base_model.model), logits(model), torch.float32, factor=16)


def test_load_adapter_weights_is_exact_and_keeps_what_learns(adapter: Path) -> None:
    model = randomize(apply_lora(tiny_llama()), seed=4)
    model.load_adapter_weights(adapter)
    expected = LoraModel.from_pretrained(adapter)
    assert torch.equal(logits(model), logits(expected))
    assert any(p.requires_grad for p in model.parameters())


def test_loading_a_third_adapter_counts_no_more_forward_work(adapter: Path) -> None:
    """Adapters that are loaded and not active change no bit."""
    model = LoraModel.from_pretrained(adapter)
    expected = logits(model)
    model.load_adapter(adapter, "b")
    model.load_adapter(adapter, "c")
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    assert not any(p.requires_grad for p in model.parameters())


# The real model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def intents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, dict[str, Tensor]]:
    """(adapter's folder, logits, batch) of the real BERT with a head of four labels, new on its checkpoint."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    batch = dict(tokenizer(["turn the light on", "what is the weather in Rome?"], padding=True, return_tensors="pt"))
    labels = {0: "light", 1: "weather", 2: "music", 3: "alarm"}
    base = AutoModelForSequenceClassification.from_pretrained(minilm(), id2label=labels)
    model = apply_lora(base, LoraConfig(r=4))
    assert set(model.lora_configs) == {"default"}
    assert [n for n, _ in model.named_modules() if n.endswith(".copies.default")] == ["classifier.copies.default"]
    randomize(model, scale=0.02).eval()
    folder = tmp_path_factory.mktemp("intents")
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(**batch).logits, batch


def test_the_head_of_a_real_model_comes_back_on_a_fresh_base(intents: tuple[Path, Tensor, dict[str, Tensor]]) -> None:
    from transformers import AutoModelForSequenceClassification

    folder, expected, batch = intents
    fresh = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=4)
    for loaded in (LoraModel.from_pretrained(folder), LoraModel.from_pretrained(folder, base_model=fresh)):
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, expected)
        assert loaded.config.id2label[3] == "alarm"


def test_a_classification_pipeline(intents: tuple[Path, Tensor, dict[str, Tensor]]) -> None:
    import transformers

    folder, _, _ = intents
    texts = ["turn the light on", "what is the weather in Rome?", "play some jazz"]
    pipe = hf_lora.pipeline("text-classification", folder)
    assert isinstance(pipe.model, LoraModel)
    merged = LoraModel.from_pretrained(folder, merge=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    expected = transformers.pipeline("text-classification", model=merged, tokenizer=tokenizer)(texts)
    found = pipe(texts)
    assert [f["label"] for f in found] == [e["label"] for e in expected]
    assert {f["label"] for f in found} <= {"light", "weather", "music", "alarm"}
    for f, e in zip(found, expected, strict=True):
        assert f["score"] == pytest.approx(e["score"], rel=1e-4)
    assert type(hf_lora.pipeline("text-classification", folder, merge=True).model) is type(merged)
    with pytest.raises(StateError, match=r"does not generate text\. Name its own task"):
        hf_lora.pipeline("text-generation", folder)


def test_a_generation_pipeline(tmp_path: Path) -> None:
    """The tokenizer is taken from the adapter's folder, where the base has none."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(61))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tiny_llama().save_pretrained(tmp_path / "base")
    model = randomize(apply_lora(type(tiny_llama()).from_pretrained(tmp_path / "base")))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    asked = dict(max_new_tokens=6, do_sample=False)
    found = hf_lora.pipeline("text-generation", tmp_path / "adapter")("w3 w4 w5", **asked)
    merged = LoraModel.from_pretrained(tmp_path / "adapter", merge=True)
    expected = transformers.pipeline("text-generation", model=merged, tokenizer=tokenizer)("w3 w4 w5", **asked)
    base = transformers.pipeline("text-generation", model=tiny_llama(), tokenizer=tokenizer)("w3 w4 w5", **asked)
    assert found == expected
    assert found != base


def test_a_head_that_the_adapter_brings_is_not_reported_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike one that nobody brings."""
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config = tiny_bert().config
    BertModel(config).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert "classifier.weight" in caplog.text
    apply_lora(model).save_pretrained(tmp_path / "with")
    caplog.clear()
    LoraModel.from_pretrained(tmp_path / "with")
    assert "classifier.weight" not in caplog.text
    LoraModel.from_pretrained(drop_modules(tmp_path / "with", "classifier"))
    assert "classifier.weight" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_is_saved_in_16_bits_where_asked(dtype: torch.dtype, tmp_path: Path) -> None:
    model = randomize(apply_lora(tiny_llama(), LoraConfig(r=4)))
    model.save_pretrained(tmp_path, dtype=dtype)
    held = load_file(tmp_path / "adapter_model.safetensors")
    own = model.get_adapter_state_dict()
    assert all(tensor.dtype == dtype and torch.equal(tensor, own[key].to(dtype)) for key, tensor in held.items())
    again = LoraModel.from_pretrained(tmp_path, base_model=tiny_llama())
    assert all(torch.equal(t, held[key].float()) for key, t in again.get_adapter_state_dict().items())


def test_a_save_refuses_what_it_would_ignore(tmp_path: Path) -> None:
    model = apply_lora(tiny_llama(), LoraConfig(r=2))
    with pytest.raises(ConfigError, match="adapter_nam is not an argument") as raised:
        model.save_pretrained(tmp_path / "a", safe_serialization=False, variant="fp16", adapter_nam="default")
    assert len(raised.value.faults) == 3
    assert not (tmp_path / "a").exists()
    model.save_pretrained(tmp_path / "a", safe_serialization=True, max_shard_size="1GB", variant=None)
    model.delete_adapter("default")
    with pytest.raises(StateError, match="has no adapters"):
        model.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_pefts_task_type_of_a_model_that_reads_images_too(tmp_path: Path) -> None:
    """PEFT says CAUSAL_LM of it; the auto class of that task does not have it, or has its text model."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    base = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=39))
    base.eval().save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False
    )
    theirs = peft.get_peft_model(LlavaForConditionalGeneration.from_pretrained(tmp_path / "base"), settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = LoraModel.from_pretrained(tmp_path / "adapter")
    assert isinstance(model, LlavaForConditionalGeneration)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert_near(model(input_ids=ids).logits, theirs(input_ids=ids).logits, torch.float32, 16)
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
        assert_near(merged(input_ids=ids).logits, theirs(input_ids=ids).logits, torch.float32, 16)

"""The reference of a preference trainer is the model that training starts from: the first loss of DPO is ln 2."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from hf_lora import ConfigError, LoraConfig, LoraDPOConfig, LoraDPOTrainer, LoraModel, apply_lora, merge_to_folder
from hf_lora.adapt.walk import adapter_layers, original_modules
from hf_lora.train.reference import Reference

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "good", "bad", "yes", "no"]
SIZES: dict[str, Any] = dict(
    vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
)
CONFIG = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("reference") / "base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: str) -> str:
    folder = str(Path(base).parent / "sft")
    config = dataclasses.replace(CONFIG, lora_dropout=0.5)
    randomize(apply_lora(AutoModelForCausalLM.from_pretrained(base), config)).save_pretrained(folder)
    return folder


@pytest.fixture
def trainer(base: str, tmp_path: Path) -> Callable[..., Any]:
    rows = datasets.Dataset.from_list([{"prompt": "a b c", "chosen": " good yes", "rejected": " bad no"}] * 4)

    def make(model: Any, **options: Any) -> Any:
        names = [name for name in options if name in LoraDPOConfig.__dataclass_fields__]
        args = LoraDPOConfig(
            str(tmp_path / "run"), logging_steps=1, report_to="none", save_strategy="no", learning_rate=1e-2,
            per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
            **{"max_steps": 1, **{n: options.pop(n) for n in names}},
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(base)
        return LoraDPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, **options)

    return make


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def starts_at_its_reference(trainer: Any) -> bool:
    return losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def storages(*models: torch.nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for model in models for tensor in model.parameters()}


def grown(base: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(WORDS) + 2)
    return model


def changed(base: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[0].mlp.up_proj.weight.data.normal_()
    return model


def unnamed(base: str) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


@pytest.mark.parametrize("make", [str, AutoModelForCausalLM.from_pretrained, changed, grown, unnamed])
def test_a_new_adapter_starts_at_its_base_which_is_in_memory_once(
    make: Callable[[str], Any], base: str, trainer: Callable[..., Any]
) -> None:
    """Whatever the base is: loaded by name or in memory, changed or resized after loading, or never in a file."""
    whole = ["embed_tokens", "lm_head"] if make is grown else None
    subject = trainer(make(base), peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=whole))
    assert subject.ref_model.kept is None
    assert isinstance(subject.ref_model, Reference)
    assert storages(subject.model, subject.ref_model) == storages(subject.model)
    assert starts_at_its_reference(subject)
    layers = adapter_layers(subject.model)
    assert layers
    assert all(name.endswith("q_proj") for name in layers)


@pytest.mark.parametrize("start", ["model", "adapter", "folder"])
def test_a_four_bit_base_is_its_own_reference(start: str, trainer: Callable[..., Any], tmp_path: Path) -> None:
    """The model with its adapter disabled or as it was, over the same 4-bit weights; none is rounded to bfloat16."""
    from quantized_bases import load, method, save_base

    folder = str(save_base(tmp_path / "wide", vocab_size=len(WORDS)))
    model: Any = load(Path(folder), "nf4")
    options: dict[str, Any] = {"lora_config": CONFIG}
    if start == "folder":
        model, options["model_init_kwargs"] = folder, {"quantization_config": method("nf4"), "dtype": "float32"}
    elif start == "adapter":
        model, options = randomize(apply_lora(model, CONFIG)), {}
    before = {name: p.detach().clone() for name, p in load(Path(folder), "nf4").named_parameters()}
    subject = trainer(model, max_steps=3, bf16=False, **options)
    model, ids = subject.model, torch.arange(2, 8)[None]
    assert isinstance(subject.ref_model, Reference)
    assert storages(model, subject.ref_model) == storages(model)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    first = model.eval()(ids).logits
    found = losses(subject)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found[2] < found[1] < found[0]
    assert torch.equal(subject.ref_model(ids).logits, first)
    assert not torch.allclose(model.eval()(ids).logits, first, rtol=1e-2)
    frozen = {name: p for name, p in model.named_parameters() if name in before}
    assert len(frozen) == len(before)
    assert all(p.dtype == before[name].dtype and torch.equal(p, before[name]) for name, p in frozen.items())
    assert any(p.dtype == torch.uint8 for p in frozen.values())


def test_one_configuration_is_enough(base: str, trainer: Callable[..., Any]) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="both lora_config and peft_config"):
        trainer(AutoModelForCausalLM.from_pretrained(base), peft_config=config, lora_config=CONFIG)
    with pytest.raises(ConfigError, match="ref_model is the second argument"):
        LoraDPOTrainer(base, LoraDPOConfig("unused"))


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_trained_adapter_is_its_own_reference(
    loaded: bool, options: dict[str, Any], adapter: str, trainer: Callable[..., Any]
) -> None:
    """Also while it has dropout; the values of the adapter in training are the same bits after each reference pass."""
    model = LoraModel.from_pretrained(adapter, is_trainable=True) if loaded else adapter
    subject = trainer(model, **options, max_steps=3)
    before = {name: tensor.clone() for name, tensor in subject.model.get_adapter_state_dict().items()}
    if subject.ref_model is not None:
        ids = torch.arange(2, 8)[None]
        subject.model.eval()
        first = subject.model(ids).logits
        assert torch.equal(subject.ref_model(ids).logits, first)
        for tensor in subject.model.get_adapter_state_dict().values():
            tensor.data.mul_(3)  # shares memory with the model's
        assert not torch.equal(subject.model(ids).logits, first)
        assert torch.equal(subject.ref_model(ids).logits, first)
        for name, tensor in subject.model.get_adapter_state_dict().items():
            assert torch.equal(tensor, before[name] * 3)
            tensor.data.copy_(before[name])
    assert starts_at_its_reference(subject)


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_other_data_are_evaluated_after_training_with_precomputed_references(
    start: str, base: str, adapter: str, trainer: Callable[..., Any]
) -> None:
    """The loss is the one that is computed with a reference at each step."""
    more = datasets.Dataset.from_list([{"prompt": "a b", "chosen": " yes good", "rejected": " no"}] * 4)
    found = []
    for precompute in (True, False):
        options: dict[str, Any] = {} if start == "adapter" else {"lora_config": CONFIG}
        model = adapter if start == "adapter" else base
        subject = trainer(model, precompute_ref_log_probs=precompute, max_steps=3, seed=1, **options)
        subject.train()
        found.append(subject.evaluate(more)["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] != pytest.approx(math.log(2), abs=1e-4)


def test_the_other_ways_to_continue_start_at_the_adapter_too(
    adapter: str, trainer: Callable[..., Any], tmp_path: Path
) -> None:
    reference = LoraModel.from_pretrained(adapter)
    subject = trainer(LoraModel.from_pretrained(adapter, is_trainable=True), ref_model=reference)
    assert starts_at_its_reference(subject)
    merge_to_folder(adapter, tmp_path / "merged")
    assert starts_at_its_reference(trainer(str(tmp_path / "merged"), lora_config=CONFIG))


def test_what_a_trainer_does_to_the_reference_does_not_reach_the_model(base: str, trainer: Callable[..., Any]) -> None:
    subject = trainer(base, lora_config=CONFIG)
    model, reference = subject.model, subject.ref_model
    attributes, modules = dict(vars(model)), [module for _, module in original_modules(model)]
    reference.forward = None
    reference.config_of_mine = 1
    reference.lm_head = torch.nn.Linear(1, 1)
    assert reference.train() is reference.eval() is reference.to(torch.float64) is reference
    assert reference.config is model.config
    assert list(reference.parameters()) == [] == list(reference.children())
    assert dict(vars(model)) == attributes
    assert [module for _, module in original_modules(model)] == modules
    assert model.dtype == torch.float32


@pytest.mark.parametrize("from_adapter", [True, False])
def test_a_synchronized_reference_mixes_the_factors(
    from_adapter: bool, base: str, adapter: str, trainer: Callable[..., Any]
) -> None:
    """After each step it moves by the share of `ref_model_mixup_alpha`, as TRL's moves the parameters of a model."""
    share, found, expected = 0.25, [], []
    options: dict[str, Any] = {
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": share,
        "max_steps": 4,
    }
    subject = trainer(
        adapter if from_adapter else base, **options, **({} if from_adapter else {"lora_config": CONFIG})
    )

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            found.append([value.double() for _, value in subject.ref_model.kept])
            if not expected:
                expected.append(found[0])

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = [parameter.detach().double() for parameter, _ in subject.ref_model.kept]
            expected.append([(1 - share) * old + share * new for old, new in zip(expected[-1], now, strict=True)])

    subject.add_callback(Watch())
    assert starts_at_its_reference(subject)
    assert len(found) == 4
    for values, wanted in zip(found, expected, strict=False):
        for value, want in zip(values, wanted, strict=True):
            assert torch.allclose(value, want, rtol=4e-7, atol=1e-9)
    assert not torch.equal(found[-1][1], found[0][1])


def test_norms_that_are_cached_in_evaluation_are_those_of_the_values_that_act(base: str) -> None:
    config = LoraConfig(method="dora", r=4, target_modules=["q_proj", "v_proj"])
    model = randomize(apply_lora(AutoModelForCausalLM.from_pretrained(base), config)).eval()
    trainer = type("Trainer", (), {"model": model, "_bare_model": model, "adapter_is_new": False})()
    reference, ids = Reference(trainer), torch.tensor([[4, 5, 6, 7, 8]])
    first = model(input_ids=ids).logits
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)  # in place, as an optimizer does
    trained = model(input_ids=ids).logits
    assert torch.equal(reference(input_ids=ids).logits, first)
    assert torch.equal(model(input_ids=ids).logits, trained)
    assert not torch.allclose(first, trained)

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
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_lora import ConfigError, LoraConfig, LoraModel, LoraTrainerMixin, apply_lora, merge_to_folder
from hf_lora.adapt.walk import adapter_layers

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "good", "bad", "yes", "no"]
CONFIG = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


class LoraDPOTrainer(LoraTrainerMixin, trl.DPOTrainer):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("reference") / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: str) -> str:
    folder = str(Path(base).parent / "sft")
    randomize(apply_lora(AutoModelForCausalLM.from_pretrained(base), CONFIG)).save_pretrained(folder)
    return folder


@pytest.fixture
def trainer(base: str, tmp_path: Path) -> Callable[..., Any]:
    rows = datasets.Dataset.from_list([{"prompt": "a b c", "chosen": " good yes", "rejected": " bad no"}] * 4)

    def make(model: Any, **options: Any) -> Any:
        names = [name for name in options if name in trl.DPOConfig.__dataclass_fields__]
        args = trl.DPOConfig(
            str(tmp_path / "run"), max_steps=1, logging_steps=1, report_to="none", save_strategy="no", bf16=False,
            per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, **{n: options.pop(n) for n in names},
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(base)
        return LoraDPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, **options)

    return make


def first_loss(trainer: Any) -> float:
    trainer.train()
    return float(trainer.state.log_history[0]["loss"])


def test_a_new_adapter_starts_at_its_base(base: str, trainer: Callable[..., Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    subject = trainer(model, peft_config=config)
    assert first_loss(subject) == pytest.approx(math.log(2), abs=1e-5)
    layers = adapter_layers(model)
    assert layers
    assert all(name.endswith("q_proj") for name in layers)
    with pytest.raises(ConfigError, match="both lora_config and peft_config"):
        trainer(AutoModelForCausalLM.from_pretrained(base), peft_config=config, lora_config=CONFIG)


def test_a_trained_adapter_needs_a_reference_with_it(
    adapter: str, trainer: Callable[..., Any], tmp_path: Path
) -> None:
    """Both ways that the message names start at ln 2."""
    with pytest.raises(ConfigError, match=r"(?s)already trained.*hf-lora merge.*ref_model=LoraModel"):
        trainer(LoraModel.from_pretrained(adapter, is_trainable=True))
    reference = LoraModel.from_pretrained(adapter)
    subject = trainer(LoraModel.from_pretrained(adapter, is_trainable=True), ref_model=reference)
    assert first_loss(subject) == pytest.approx(math.log(2), abs=1e-5)
    merge_to_folder(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert first_loss(trainer(merged, lora_config=CONFIG)) == pytest.approx(math.log(2), abs=1e-5)


def test_a_base_that_is_not_that_of_its_files_is_refused(base: str, trainer: Callable[..., Any]) -> None:
    changed = AutoModelForCausalLM.from_pretrained(base)
    changed.model.layers[0].mlp.up_proj.weight.data.normal_()
    grown = AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(len(WORDS) + 2)
    whole = dataclasses.replace(CONFIG, modules_to_save=["embed_tokens", "lm_head"])
    for model, config, reason in (
        (changed, CONFIG, "weights of its base differ"), (grown, whole, "13 rows, and the reference's 11"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=reason):
            trainer(model, lora_config=config)
    with pytest.raises(ConfigError, match="sync_ref_model"):
        trainer(AutoModelForCausalLM.from_pretrained(base), lora_config=CONFIG, sync_ref_model=True)

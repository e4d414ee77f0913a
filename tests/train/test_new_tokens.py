"""`lora_train_new_tokens`: rows for the tokens of a chat template, which are trained and saved, and nothing silent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import VOCABULARY, assert_same_tensors, snapshot
from helpers import tiny_llama as untied_or_tied
from tiny import Rows, sentences, tiny_bert
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_lora import ConfigError, LoraConfig, LoraModel, LoraTrainer, TargetError

Make = Callable[..., Any]
NEW = ["<|user|>", "<|assistant|>", "<|end|>"]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    untied_or_tied(tied=request.param).save_pretrained(folder)
    return folder


def tokenizer(more: bool = True) -> Any:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0")
    if more:
        made.add_special_tokens({"additional_special_tokens": NEW})
    return made


def chats() -> Rows:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, VOCABULARY, (9,), generator=generator) for _ in range(8)]
    for ids in rows:
        ids[0], ids[3], ids[8] = VOCABULARY, VOCABULARY + 1, VOCABULARY + 2
    return Rows([{"input_ids": ids, "labels": ids.clone()} for ids in rows])


def trained(folder: Path, args: Any, **more: Any) -> Any:
    model = LlamaForCausalLM.from_pretrained(folder)
    trainer = LoraTrainer(model=model, args=args, train_dataset=chats(), **{"processing_class": tokenizer(), **more})
    trainer.train()
    return trainer


def test_one_flag_resizes_trains_and_saves_the_new_rows(base: Path, arguments: Make, tmp_path: Path) -> None:
    args = arguments(max_steps=3, lora_train_new_tokens=True, lora_target_modules=["q_proj"], lora_r=2)
    model = trained(base, args).model.eval()
    start = LlamaForCausalLM.from_pretrained(base)
    tied = start.config.tie_word_embeddings
    ids = [*range(VOCABULARY, VOCABULARY + len(NEW))]
    rows = model.lora_configs["default"].trainable_token_indices
    assert rows == {"model.embed_tokens": ids} | ({} if tied else {"lm_head": ids})
    assert len(model.get_input_embeddings().weight) == VOCABULARY + len(NEW)
    assert torch.equal(model.get_input_embeddings().weight[:VOCABULARY], start.get_input_embeddings().weight)
    gone = {n for n, p in model.named_parameters() if p.requires_grad and "q_proj" not in n}
    assert len(gone) == (1 if tied else 2)
    batch = chats()[0]["input_ids"][None]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(batch).logits
        again = LoraModel.from_pretrained(tmp_path, base_model=LlamaForCausalLM.from_pretrained(base))
        assert torch.allclose(again(batch).logits, expected, atol=1e-5)
        resized = LlamaForCausalLM.from_pretrained(base)
        resized.resize_token_embeddings(VOCABULARY + len(NEW))
        theirs = peft.PeftModel.from_pretrained(resized, tmp_path).eval()
        assert torch.allclose(theirs(batch).logits, expected, atol=1e-5)


def test_a_script_that_resizes_itself_needs_the_flag_alone(base: Path, arguments: Make) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(VOCABULARY + len(NEW), pad_to_multiple_of=8)
    args = arguments(max_steps=1, lora_train_new_tokens=True, lora_target_modules=["q_proj"])
    trainer = LoraTrainer(model, args, None, chats(), None, tokenizer())  # by position
    rows = trainer.model.lora_configs["default"].trainable_token_indices
    assert rows["model.embed_tokens"] == [*range(VOCABULARY, VOCABULARY + 8)]  # a file has all that the base lacks
    trainer.train()


def test_nothing_happens_silently(base: Path, arguments: Make, messages: list[str]) -> None:
    args = arguments(max_steps=1, lora_target_modules=["q_proj"])
    model = LlamaForCausalLM.from_pretrained(base)
    LoraTrainer(model=model, args=args, train_dataset=chats(), processing_class=tokenizer())
    assert any(
        f"has {VOCABULARY + len(NEW)} tokens, and the model has rows for {VOCABULARY}. With lora_train_new_tokens=True"
        in text
        for text in messages
    )
    args = arguments(max_steps=1, lora_target_modules=["q_proj"], lora_train_new_tokens=True)
    model = LlamaForCausalLM.from_pretrained(base)
    trainer = LoraTrainer(model=model, args=args, train_dataset=chats(), processing_class=tokenizer(more=False))
    assert trainer.model.lora_configs["default"].trainable_token_indices is None
    assert f"the base has rows for all {VOCABULARY} tokens" in messages[-1]


def test_what_does_not_fit_changes_nothing(base: Path, arguments: Make) -> None:
    args = arguments(lora_train_new_tokens=True)
    for more, error, match in (
        (dict(processing_class=None), ConfigError, "its tokenizer as processing_class"),
        (dict(lora_config=LoraConfig(trainable_token_indices=[3])), ConfigError, "are both given"),
        (dict(lora_config=LoraConfig(target_modules=["nothing"])), TargetError, "matches nothing"),
        (dict(lora_config=LoraConfig(modules_to_save=["embed_tokens"])), TargetError, "is trained whole"),
    ):
        model = LlamaForCausalLM.from_pretrained(base)
        before = snapshot(model)
        with pytest.raises(error, match=match):
            LoraTrainer(model=model, args=args, **{"processing_class": tokenizer(), **more})
        assert_same_tensors(snapshot(model), before)
        assert model.config.vocab_size == VOCABULARY


def test_a_classifier_has_no_output_embedding(arguments: Make) -> None:
    args = arguments(max_steps=1, lora_train_new_tokens=True)
    trainer = LoraTrainer(model=tiny_bert(), args=args, train_dataset=sentences(), processing_class=tokenizer())
    rows = trainer.model.lora_configs["default"].trainable_token_indices
    assert rows == {"bert.embeddings.word_embeddings": [*range(VOCABULARY, VOCABULARY + len(NEW))]}
    trainer.train()

"""A tokenizer with a chat template, prompts, and the answers of transformers to them."""

from __future__ import annotations

from typing import Any

import torch
from helpers import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('who?') }}"
    "{% endif %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<system>", "<user>", "<assistant>"]
PROMPTS = ["w9", "w20 w21 w22 w23 w24 w25 w26", "w30 w31", "w11 w12 w13 w14", "w40 w41 w42"]


def tiny_tokenizer(template: str | None = TEMPLATE) -> Any:
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCABULARY))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
    )
    tokenizer.chat_template = template
    return tokenizer


def own_answer(model: Any, tokenizer: Any, ids: list[int], new: int = 8) -> str:
    """transformers' greedy answer to one prompt."""
    tokens = torch.tensor([ids])
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False)
    return str(tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True))

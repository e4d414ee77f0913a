"""Tiny models in folders, with tokenizers, for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import write_lines

WORDS = ["open", "close", "door", "window", "the", "a", "please", "now", "light", "on", "off", "turn", "it", "red"]


def _tokenizer(folder: Path, **special: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*dict.fromkeys(special.values()), *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=32, **special).save_pretrained(folder)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The backbone of a BERT, without a head."""
    from helpers import tiny_bert

    folder = tmp_path_factory.mktemp("bert")
    tiny_bert().bert.save_pretrained(folder)
    _tokenizer(folder, unk_token="[UNK]", pad_token="[PAD]")
    return str(folder)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A language model whose tokenizer has no padding token."""
    from helpers import tiny_llama

    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    _tokenizer(folder, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return str(folder)


@pytest.fixture(scope="session")
def texts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 24 labeled texts as CSV and JSONL, and prompts with completions."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [
        (f"{'open' if i % 2 else 'close'} the {WORDS[i % len(WORDS)]}", "yes" if i % 2 else "no") for i in range(24)
    ]
    csv = "".join(f'"{text}",{label}\n' for text, label in rows)
    (folder / "rows.csv").write_text("text,label\n" + csv, encoding="utf-8")
    write_lines(folder / "rows.jsonl", [{"sentence": text, "intent": label} for text, label in rows])
    write_lines(folder / "pairs.jsonl", [{"prompt": text, "completion": "now please"} for text, _ in rows])
    return folder


@pytest.fixture(scope="session")
def adapter_folder(bert_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A classifier's adapter with random factors."""
    from helpers import randomize
    from transformers import AutoModelForSequenceClassification

    from hf_lora import LoraConfig, apply_lora

    model = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=3)
    apply_lora(model, LoraConfig(r=4, alpha_pattern={"query": 2.0}))
    randomize(model)
    folder = tmp_path_factory.mktemp("adapter") / "three"
    model.save_pretrained(folder)
    return str(folder)


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="session")
def chat_adapter(llama_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random adapter of the language model, saved with a tokenizer that has a chat template."""
    from helpers import randomize
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_lora import LoraConfig, apply_lora

    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    randomize(apply_lora(model, LoraConfig(r=4)))
    folder = tmp_path_factory.mktemp("chat-adapter")
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.add_tokens([f"word{i}" for i in range(len(tokenizer), model.config.vocab_size)])  # all can be read
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)

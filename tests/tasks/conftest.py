"""Tiny base models of every kind, a file of rows for each task, and a run on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import VOCABULARY, tiny_bert, tiny_t5, why_no_images, write_lines
from tasks.task_runs import FILES, Run

from hf_lora.data.tables import Table

WORDS = ["open", "close", "door", "window", "the", "a", "please", "now", "light", "on", "off", "turn", "Anna", "Rome"]
PIECES = ["##s", "##ed", "##ing", ".", ",", "?", "old", "new", "house", "in"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def table(**columns: list[Any]) -> Table:
    count = len(next(iter(columns.values())))
    return Table("rows.csv", columns, list(range(2, count + 2)), "line", {})


def text(source: random.Random, count: int) -> str:
    return " ".join(source.choice(WORDS) + source.choice(["", "", "s", "ing"]) for _ in range(count))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A masked language model, whose words may be several tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    tiny_bert(cls="BertForMaskedLM", vocab_size=VOCABULARY).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS, *PIECES])}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=32, **dict(zip(names, SPECIAL, strict=True))
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder_decoder")
    tiny_t5().save_pretrained(folder)
    words = ["<pad>", "</s>", "<unk>", *WORDS, *(f"{word}s" for word in WORDS)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> str:
    import torch
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    pytest.importorskip("PIL")
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        initializer_range=0.2,
    )  # fmt: skip
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    if reason := why_no_images(folder):
        pytest.skip(reason)
    return str(folder)


def tagged(source: random.Random) -> dict[str, Any]:
    words = text(source, source.randint(2, 7)).split()
    names = {"Anna": "B-PER", "Rome": "B-LOC"}
    tags = [next((tag for name, tag in names.items() if word.startswith(name)), "O") for word in words]
    for i in range(1, len(tags)):
        if tags[i - 1] != "O" and tags[i] == "O":
            tags[i] = "I" + tags[i - 1][1:]
    return {"tokens": words, "ner_tags": tags}


def question(source: random.Random) -> dict[str, Any]:
    context = text(source, source.randint(5, 25))
    words = context.split()
    first = source.randrange(len(words))
    answer = " ".join(words[first : first + source.randint(1, 3)])
    answers = {"text": [answer], "answer_start": [len(" ".join(["", *words[:first]])) if first else 0]}
    answers["answer_start"][0] = len(" ".join(words[:first])) + (first > 0)
    return {"question": text(source, 3) + "?", "context": context, "answers": answers}


def summarized(document: str) -> dict[str, Any]:
    return {"document": document, "summary": " ".join(document.split()[:3])}


def labeled(sentence: str) -> dict[str, Any]:
    return {"text": sentence, "labels": sorted({word[:4] for word in sentence.split()} & {"open", "clos", "door"})}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 rows for each task, whose file has its name."""
    folder, source = tmp_path_factory.mktemp("rows"), random.Random(0)
    makers: dict[str, Any] = {
        "tags": lambda i: tagged(source),
        "spans": lambda i: question(source),
        "pairs": lambda i: summarized(text(source, 5).replace("ing", "s")),
        "lists": lambda i: labeled(text(source, 4)),
        "texts": lambda i: {"text": text(source, source.randint(4, 12))},
    }  # fmt: skip
    for name, make in makers.items():
        write_lines(folder / f"{name}.jsonl", [make(i) for i in range(24)])
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with a folder for each label."""
    image = pytest.importorskip("PIL.Image")
    folder, source = tmp_path_factory.mktemp("pictures"), random.Random(0)
    for i in range(18):
        name, red = [("dark", 20), ("red", 200), ("bright", 250)][i % 3]
        (folder / name).mkdir(exist_ok=True)
        size = (source.randint(10, 24), source.randint(10, 24))
        made = image.new("RGB", size)
        made.putdata([(red, source.randint(0, red), source.randint(0, 60)) for _ in range(size[0] * size[1])])
        made.save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def run_of(
    request: pytest.FixtureRequest, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    """The run of a task, once for all tests."""
    runs: dict[str, Run] = {}

    def get(task: str) -> Run:
        if task not in runs:
            base, name = FILES[task]
            file = rows / name if name else request.getfixturevalue("pictures")
            runs[task] = Run(task, request.getfixturevalue(base), file, tmp_path_factory.mktemp("run") / "out")
        return runs[task]

    return get

"""Every Python block of the README and the documentation runs, page by page, in a folder with a tiny base model."""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import why_no_images
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "good", "bad", "fine", "poor", "film", "book", "song", "was", "is", "the", "a", "very", "not", "so"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `bert-base` is a tiny BERT without a head, with data beside it."""
    folder = tmp_path_factory.mktemp("docs")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder / "bert-base")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["mask_token"] = "[MASK]"
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "bert-base")
    verdicts = {"good": "up", "bad": "down", "fine": "up", "poor": "down", "so so": "flat"}
    lines = [f"the {thing} was {how},{label}" for thing in ("film", "book", "song") for how, label in verdicts.items()]
    for name in ("train.csv", "test.csv"):
        (folder / name).write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    positives = ["the film was fine,a good film", "the song was bad,a poor song", "a very good book,the book was fine"]
    (folder / "pairs.csv").write_text("\n".join(["anchor,positive", *positives]) + "\n", encoding="utf-8")
    _language_model(folder)
    _other_tasks(folder)
    return folder


def _other_tasks(folder: Path) -> None:
    """Data for each task, and models of other kinds: `t5-base` and `vit-base`."""
    from helpers import tiny_t5, write_lines
    from PIL import Image
    from transformers import AutoTokenizer, ViTConfig, ViTImageProcessor, ViTModel

    tiny_t5().save_pretrained(folder / "t5-base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "my-adapter")
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(folder / "t5-base")
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    ViTModel(config).save_pretrained(folder / "vit-base")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit-base")
    text = "the film was good"
    write_lines(folder / "tags.jsonl", [{"tokens": text.split(), "ner_tags": ["O", "B-ART", "O", "O"]}] * 8)
    write_lines(folder / "summaries.jsonl", [{"document": text, "summary": "good film"}] * 8)
    for i in range(8):
        (folder / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(folder / "images" / "ab"[i % 2] / f"{i}.png")


def _language_model(folder: Path) -> None:
    """`my-adapter`: an adapter of `chat-base`, a tiny language model with a template, `test.jsonl` with chats, and
    `pairs.jsonl` with pairs."""
    from helpers import tiny_llama

    from hf_lora import apply_lora

    tiny_llama(max_position_embeddings=256).save_pretrained(folder / "chat-base")
    model = apply_lora(LlamaForCausalLM.from_pretrained(folder / "chat-base"))
    model.save_pretrained(folder / "my-adapter")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS[5:]])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    for name in ("my-adapter", "chat-base"):
        tokenizer.save_pretrained(folder / name)
    chat = [{"role": "user", "content": "was the film good"}, {"role": "assistant", "content": "very good"}]
    pair = {"prompt": chat[:1], "chosen": chat[1:], "rejected": [{"role": "assistant", "content": "not so good"}]}
    (folder / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 4, encoding="utf-8")
    (folder / "test.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 2, encoding="utf-8")


@pytest.fixture
def names() -> dict[str, Any]:
    """What the snippets take for granted."""
    rows = [
        {"input_ids": [2, 5 + i % 10, 6 + i % 8, 3], "attention_mask": [1] * 4, "labels": i % 3} for i in range(24)
    ]
    ids = torch.randint(4, len(WORDS), (2, 6))
    return {"train_set": Dataset.from_list(rows), "test_set": Dataset.from_list(rows[:8]), "batch": {"input_ids": ids}}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_blocks_run(
    page: Path, workplace: Path, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for i, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {i + 1}", "exec"), names)
    assert names.keys() - {"train_set", "test_set", "batch", "__builtins__"}, "the page's blocks define something"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=lambda p: p.stem)
def test_commands_run(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from hf_lora.cli.main import app

    monkeypatch.chdir(workplace)
    no_images, left_out = why_no_images(workplace / "vit-base"), False
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if no_images and "vit-base" in words:
                left_out = True
            elif words[:1] == ["hf-lora"]:
                result = CliRunner().invoke(app, words[1:])
                assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
    if left_out:
        pytest.skip(f"all others run; {no_images}")


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    missing = [p.name for p in (ROOT / "docs").glob("*.md") if p.name not in navigation]
    assert not missing


def test_the_page_of_public_names_lists_them_all_and_no_other() -> None:
    import hf_lora

    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    listed = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(listed) == sorted(set(hf_lora.__all__) - {"__version__"})


def test_the_documentation_builds(tmp_path: Path) -> None:
    """A broken link, or a name that is not there, is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "api" / "index.html").stat().st_size > 10_000


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_name_of_the_package_in_a_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"\bhf_lora(?:\.\w+)+(?!\.\w)", text)) - {"hf_lora.json"}:
        assert pkgutil.resolve_name(name) is not None
    for path in set(re.findall(r"`(hf_lora/[\w/.]*)`", text)):
        assert (ROOT / path).exists(), path


def script(name: str) -> Any:
    """A script of the documentation as a module."""
    spec: Any = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_what_can_be_combined_is_that_of_the_code() -> None:
    module = script("make_support")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run docs/make_support.py"
    assert "| `alora` | unmerged (3) |" in module.page()


def test_the_picture_of_the_structure_is_that_of_the_code() -> None:
    module = script("make_structure")
    assert module.PICTURE.read_text(encoding="utf-8") == module.draw(), "run docs/make_structure.py"
    rows = module.rows(module.graph())
    assert rows[0] == ["cli"]
    assert set(rows[-1]) == {"layers", "safe_io"}

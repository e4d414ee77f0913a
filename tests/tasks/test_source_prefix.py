"""`--source-prefix` is the same as a file whose sources begin with it, in training, evaluation and generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import run_command, write_lines

from hf_lora.data.tables import read_table

FAST = ("--use-cpu", "--disable-tqdm", "true", "--save-strategy", "no", "--logging-strategy", "no", "--learning-rate",
        "2e-2", "--num-train-epochs", "2", "--max-target-length", "6")  # fmt: skip
PREFIX = "please turn: "


def test_a_prefix_is_as_sources_that_begin_with_it(encoder_decoder: str, rows: Path, tmp_path: Path) -> None:
    columns = read_table(rows / "pairs.jsonl").columns
    pairs = list(zip(columns["document"], columns["summary"], strict=True))
    spelled = write_lines(tmp_path / "spelled.jsonl", [{"document": PREFIX + a, "summary": b} for a, b in pairs])
    files = {"prefix": rows / "pairs.jsonl", "spelled": spelled}
    found: dict[str, list[Any]] = {}
    for name, file in files.items():
        out, more = tmp_path / name, ("--source-prefix", PREFIX) if name == "prefix" else ()
        run_command(
            "train", "--model", encoder_decoder, "--train-file", file, "--test-file", file, "--output-dir", out,
            *more, *FAST,
        )  # fmt: skip
        prompts = [text for text, _ in pairs[:3]] if name == "prefix" else [PREFIX + text for text, _ in pairs[:3]]
        words = [word for prompt in prompts for word in ("--prompt", prompt)]
        found[name] = [
            (out / "adapter_model.safetensors").read_bytes(),
            json.loads((out / "test_results.json").read_text())["test_loss"],
            json.loads(run_command("eval", out, "--file", file, "--json").stdout),
            run_command("generate", out, "--max-new-tokens", 6, *words).stdout,
        ]
    assert found["prefix"] == found["spelled"]
    words = ("--max-new-tokens", 6, "--raw", "--prompt", PREFIX + pairs[0][0])  # nothing is added to a raw prompt
    assert run_command("generate", tmp_path / "prefix", *words).stdout == found["spelled"][3].split("\n\n")[0] + "\n"
    assert f"source prefix {PREFIX!r}" in run_command("inspect", tmp_path / "prefix").stdout


def test_the_prefixes_of_the_base_are_named(encoder_decoder: str, rows: Path, tmp_path: Path) -> None:
    """T5's config lists those of its training; none is used unless it is named."""
    base = shutil.copytree(encoder_decoder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["task_specific_params"] = {"summarization": {"prefix": "summarize: "}, "other": {"max_length": 3}}
    (base / "config.json").write_text(json.dumps(config))
    words = ("train", "--model", base, "--train-file", rows / "pairs.jsonl", "--show-batch", "--use-cpu")
    shown = run_command(*words).stdout
    assert "The base knows texts that begin with 'summarize: ': --source-prefix sets one." in shown
    assert "row 1: <unk>" not in shown
    shown = run_command(*words, "--source-prefix", "please ").stdout
    assert "The base knows" not in shown
    assert "row 1: please " in shown


@pytest.mark.parametrize("prefix", ["a\x00b", "a" * 20_000])
def test_a_prefix_that_no_file_can_hold_is_refused(prefix: str) -> None:
    words = ("train", "--model", "m", "--train-file", "rows.jsonl", "--source-prefix", prefix, "--use-cpu")
    assert "--source-prefix must be a printable text" in run_command(*words, code=2).stderr

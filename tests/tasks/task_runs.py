"""One training of a task by `hf-lora train`, and what it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers import run_command
from transformers import AutoTokenizer

from hf_lora import LoraModel
from hf_lora.data.tables import Table, read_table
from hf_lora.tasks.registry import TASKS
from hf_lora.train.parsing import parse_arguments
from hf_lora.train.run_data import read_data

FAST = ("--use-cpu", "--disable-tqdm", "true", "--save-strategy", "no", "--per-device-train-batch-size", "8",
        "--learning-rate", "2e-2", "--logging-strategy", "no")  # fmt: skip
OPTIONS = {
    "masked-lm": ["--task", "masked-lm"],  # the columns do not say it
    "seq2seq-lm": ["--max-target-length", "6", "--num-train-epochs", "8"],
    "multi-label-classification": ["--num-train-epochs", "4", "--head-learning-rate", "1e-2"],
}
FILES = {
    "token-classification": ("encoder", "tags.jsonl"), "question-answering": ("encoder", "spans.jsonl"),
    "seq2seq-lm": ("encoder_decoder", "pairs.jsonl"), "multi-label-classification": ("encoder", "lists.jsonl"),
    "masked-lm": ("encoder", "texts.jsonl"), "image-classification": ("vision", ""),
}  # fmt: skip


class Run:
    """One training by `hf-lora train`, and what it needs."""

    def __init__(self, task: str, base: str, file: Path, out: Path) -> None:
        self.task, self.base, self.file, self.out = task, base, file, out
        self.words = ["--model", base, "--train-file", str(file), *OPTIONS.get(task, ["--num-train-epochs", "4"])]
        self.said = run_command("train", *self.words, "--test-file", file, "--output-dir", out, *FAST).stdout
        results: dict[str, float] = json.loads((out / "test_results.json").read_text())
        self.trained = {name.removeprefix("test_"): value for name, value in results.items()}
        self.found = json.loads(run_command("eval", out, "--file", file, "--json").stdout)
        self.table: Table = read_table(file)

    def check(self, *names: str) -> None:
        """The evaluation at the end of the training and that of the saved adapter have the same metrics."""
        assert {n: self.trained[n] for n in names if n != "rows"} == pytest.approx(
            {n: self.found[n] for n in names if n != "rows"}, rel=1e-5
        )

    def merged(self) -> Any:
        """The merged model, as a plain model of transformers."""
        model = LoraModel.from_pretrained(self.out).merge_and_unload()
        plain = getattr(transformers, TASKS[self.task].auto_class).from_config(model.config).eval()
        plain.load_state_dict(model.state_dict())
        return plain

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.base)

    def encoded(self) -> list[dict[str, Any]]:
        """The rows of the training."""
        data = read_data(parse_arguments([*self.words, "--output-dir", str(self.out / "none"), "--use-cpu"]))
        assert data.task.name == self.task
        return list(data.rows["train"])

"""The best checkpoint by metrics of generated texts and of embeddings, which are computed at each evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import run_command, write_lines
from tiny import OTHERS, TEXTS, bert_of_texts

from hf_lora import evaluate

FAST = (
    "--use-cpu", "--disable-tqdm", "true", "--logging-strategy", "no", "--eval-strategy", "epoch", "--save-strategy",
    "epoch", "--load-best-model-at-end", "true", "--num-train-epochs", "3", "--save-total-limit", "9",
)  # fmt: skip


def trained(out: Path, *words: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """The state of a run, and the metrics of its end."""
    run_command("train", "--output-dir", out, *words, *FAST)
    state = json.loads((out / "trainer_state.json").read_text())
    return state, json.loads((out / "eval_results.json").read_text())


def test_the_best_summaries(encoder_decoder: str, rows: Path, tmp_path: Path) -> None:
    """Each value in the log is that of the checkpoint, as `evaluate` reads it, and the best checkpoint is kept."""
    file, out = rows / "pairs.jsonl", tmp_path / "out"
    state, end = trained(
        out, "--model", encoder_decoder, "--train-file", file, "--eval-file", file, "--learning-rate", "4e-2",
        "--metric-for-best-model", "rouge_l", "--per-device-train-batch-size", "8",
    )  # fmt: skip
    logs = reversed(state["log_history"])  # the last is that of the best model, at the end
    logged = {log["step"]: log["eval_rouge_l"] for log in logs if "eval_rouge_l" in log}
    found = {step: evaluate(out / f"checkpoint-{step}", file).metrics["rouge_l"] for step in logged}
    assert len(logged) == 3
    assert logged == pytest.approx(found)
    assert state["best_metric"] == max(found.values()) > min(found.values())
    assert evaluate(out, file).metrics["rouge_l"] == pytest.approx(max(found.values()))
    assert end["eval_rouge_l"] == pytest.approx(max(found.values()))


def test_the_best_embeddings(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    pairs = [{"anchor": a, "positive": b} for a, b in zip(TEXTS[:4], OTHERS[:4], strict=True)]
    file, base = write_lines(tmp_path / "pairs.jsonl", pairs * 2), bert_of_texts(tmp_path / "bert")
    words = ("--model", base, "--train-file", file, "--eval-file", file, "--task", "embedding")
    state, end = trained(tmp_path / "out", *words, "--metric-for-best-model", "mrr", "--learning-rate", "1e-2")
    logged = [log["eval_mrr"] for log in state["log_history"] if "eval_mrr" in log]
    assert state["best_metric"] == max(logged) == pytest.approx(end["eval_mrr"])
    error = run_command(
        "train", *words, "--metric-for-best-model", "spearman", "--output-dir", tmp_path / "other", code=2
    ).stderr
    assert "spearman is not computed" in error
    assert "It is one of loss, accuracy@1, mrr." in error

"""`hf-lora train --task embedding`: the metrics are those of sentence-transformers, whose classes load the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_command, write_lines
from tiny import OTHERS, TEXTS, bert_of_texts

from hf_lora import DataError
from hf_lora.data.tables import Table
from hf_lora.tasks.base import Given, Options
from hf_lora.tasks.registry import TASKS

st = pytest.importorskip("sentence_transformers")
pytest.importorskip("peft")
PAIRS = [{"anchor": a, "positive": b} for a, b in zip(TEXTS[:4], OTHERS[:4], strict=True)]
ROWS = {
    "pairs": PAIRS * 3,
    "triplets": [{**row, "negative": OTHERS[i % 4 - 1]} for i, row in enumerate(PAIRS)] * 3,
    "scores": [
        {"sentence1": a, "sentence2": b, "score": s} for a, b, s in zip(TEXTS, OTHERS, [5, 1, 3.5, 0] * 2, strict=True)
    ],
}
FAST = (
    "--use-cpu", "--disable-tqdm", "true", "--save-strategy", "no", "--logging-strategy", "no", "--task", "embedding",
    "--num-train-epochs", "8", "--learning-rate", "1e-2", "--per-device-train-batch-size", "4",
)  # fmt: skip


@pytest.fixture(scope="module")
def texts_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bert_of_texts(tmp_path_factory.mktemp("texts") / "bert")


@pytest.mark.parametrize("kind", ROWS)
def test_the_command_trains_embeddings(kind: str, texts_base: str, tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer import evaluation

    rows, file, out = ROWS[kind], write_lines(tmp_path / f"{kind}.jsonl", ROWS[kind]), tmp_path / "out"
    said = run_command(
        "train", "--model", texts_base, "--train-file", file, "--test-file", file, "--output-dir", out, *FAST
    )
    assert {"pairs": "pairs from", "triplets": "triplets from", "scores": "with a similarity"}[kind] in said.stdout
    shown = run_command("train", "--model", texts_base, "--train-file", file, "--show-batch", *FAST).stdout
    assert f"row 1: {next(iter(rows[0]))}: {TEXTS[0]}" in shown
    plan = ("train", "--model", texts_base, "--train-file", file, "--dry-run", *FAST)
    assert "--task embedding lists the layers" in run_command(*plan, code=2).stderr
    results = json.loads((out / "test_results.json").read_text())
    assert not (out / "model.safetensors").exists()
    model, before = (st.SentenceTransformer(str(folder), device="cpu") for folder in (out, texts_base))

    def score(model: Any) -> float:
        if kind == "scores":
            columns = ([row[name] for row in rows] for name in ("sentence1", "sentence2", "score"))
            found = evaluation.EmbeddingSimilarityEvaluator(*columns, main_similarity="cosine")(model)
            return float(found["spearman_cosine"])
        first, second = (model.encode([row[name] for row in rows], convert_to_tensor=True) for name in PAIRS[0])
        near = st.util.cos_sim(first, second).argmax(1)
        return sum(rows[int(j)]["positive"] == row["positive"] for j, row in zip(near, rows, strict=True)) / len(rows)

    assert results["test_spearman" if kind == "scores" else "test_accuracy@1"] == pytest.approx(score(model), abs=1e-6)
    assert score(model) > score(before) or score(model) == 1
    assert "use its evaluators on SentenceTransformer" in run_command("eval", out, "--file", file, code=2).stderr
    assert torch.tensor(model.encode(TEXTS)).std() > 0


def read(**columns: Any) -> Any:
    length = len(next(iter(columns.values())))
    table = Table("rows.csv", columns, [*range(2, length + 2)], "line")
    return (
        TASKS["embedding"].read({"train": table}, Given(config=None, processor=None, options=Options())).rows["train"]
    )


def test_rows_that_do_not_fit_are_one_message() -> None:
    rows = read(query=["a", "b"], document=["c", "d"], score=["0.5", 1])
    assert rows.column_names == ["query", "document", "score"]
    assert rows["score"] == [0.5, 1.0]
    with pytest.raises(DataError, match=r"which columns hold the two texts.*'one', 'two'"):
        read(one=["a"], two=["b"])
    with pytest.raises(DataError) as caught:
        read(anchor=["a", " ", "c"], positive=["x", "y", 3], score=[1, 2, "high"])
    lines = [fault.partition(":")[0] for fault in caught.value.faults]
    assert lines == [
        "rows.csv, line 3, column 'anchor'", "rows.csv, line 4, column 'positive'", "rows.csv, line 4, column 'score'"
    ]  # fmt: skip

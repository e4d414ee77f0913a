"""Questions through the command line: windows of a context, and the best spans."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tasks.conftest import table
from tasks.task_runs import Run
from transformers import AutoConfig, AutoTokenizer

from hf_lora.data.tables import read_table
from hf_lora.evaluation.spans import score_spans
from hf_lora.tasks.base import Given
from hf_lora.tasks.question_answering import SpanMetrics
from hf_lora.tasks.registry import TASKS, choose_task


def windows_of(run: Run) -> Any:
    """The windows of `prepare_train_features` of transformers' example of question answering."""
    columns = run.table.columns
    return run.tokenizer()(
        [q.lstrip() for q in columns["question"]], columns["context"], truncation="only_second", max_length=32,
        stride=8, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip


def test_answers_are_found_in_the_windows_of_a_context(run_of: Callable[[str], Run]) -> None:
    run = run_of("question-answering")
    batch, found, inside = windows_of(run), run.encoded(), 0
    assert len(found) == len(batch["input_ids"]) > 24
    for i, (row, offsets) in enumerate(zip(found, batch["offset_mapping"], strict=True)):
        answers, ids = run.table.columns["answers"][batch["overflow_to_sample_mapping"][i]], batch["input_ids"][i]
        first = answers["answer_start"][0]
        last, parts = first + len(answers["text"][0]), batch.sequence_ids(i)
        start, end = parts.index(1), len(parts) - 1 - parts[::-1].index(1)
        expected = (ids.index(2), ids.index(2))
        if offsets[start][0] <= first and offsets[end][1] >= last:
            while start < len(offsets) and parts[start] == 1 and offsets[start][0] <= first:
                start += 1
            while offsets[end][1] >= last:
                end -= 1
            expected = (start - 1, end + 1)
            inside += 1
        assert (row["start_positions"], row["end_positions"]) == expected
        assert row["input_ids"] == ids
    assert 20 < inside < len(found)


def squad(text: str) -> list[str]:
    import string

    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def test_answers_are_the_best_spans_of_a_merged_model(run_of: Callable[[str], Run]) -> None:
    """As `postprocess_qa_predictions` of transformers' examples, and the metric of SQuAD."""
    run = run_of("question-answering")
    model, batch = run.merged(), windows_of(run)
    best: dict[int, list[tuple[float, str]]] = {}
    for i, offsets in enumerate(batch["offset_mapping"]):
        example, parts = batch["overflow_to_sample_mapping"][i], batch.sequence_ids(i)
        with torch.no_grad():
            out = model(torch.tensor([batch["input_ids"][i]]))
        starts, ends = out.start_logits[0].numpy(), out.end_logits[0].numpy()
        for s in np.argsort(starts)[-1:-21:-1]:
            for e in np.argsort(ends)[-1:-21:-1]:
                if parts[s] == parts[e] == 1 and s <= e < s + 30:
                    text = run.table.columns["context"][example][offsets[s][0] : offsets[e][1]]
                    best.setdefault(example, []).append((float(starts[s] + ends[e]), text))
    exact, shared = [], []
    for example in range(24):
        found = squad(max(best[example], key=lambda pair: pair[0])[1])
        true = squad(run.table.columns["answers"][example]["text"][0])
        common = sum(min(found.count(word), true.count(word)) for word in set(found))
        exact.append(found == true)
        shared.append(2 * common / (len(found) + len(true)) if found and true else float(found == true))
    assert run.found == pytest.approx({"rows": 24, "exact_match": np.mean(exact), "f1": np.mean(shared)})
    assert 0 < run.found["f1"] < 1
    run.check("exact_match", "f1")


def test_questions_without_an_answer_and_the_files_of_squad(rows: Path, encoder: str, tmp_path: Path) -> None:
    """As `postprocess_qa_predictions` with version_2_with_negative; nested files are the same rows."""
    columns, task = read_table(rows / "spans.jsonl").columns, TASKS["question-answering"]
    given = Given(AutoConfig.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder))
    answers = [a if i % 3 else {"text": [], "answer_start": []} for i, a in enumerate(columns["answers"])]
    flat = task.read({"train": table(**{**columns, "answers": answers})}, given).rows["train"]
    nested = [
        {"title": "t", "paragraphs": [{"context": c, "qas": [{"id": q, "question": q, "answers": pairs(a)}]}]}
        for q, c, a in zip(columns["question"], columns["context"], answers, strict=True)
    ]
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"version": "v2.0", "data": nested}))
    data = read_table(file)
    assert choose_task(data).name == task.name
    assert task.read({"train": data}, given).rows["train"] == flat
    generator = np.random.default_rng(0)
    starts, ends = ([generator.normal(size=len(row["input_ids"])) for row in flat] for _ in range(2))
    best, null = [(-np.inf, "")] * 24, [np.inf] * 24
    for window, s, e in zip(flat.windows, starts, ends, strict=True):
        i = window.example
        null[i] = min(null[i], s[0] + e[0])
        for a in np.argsort(s)[-1:-21:-1]:
            for b in np.argsort(e)[-1:-21:-1]:
                first, last = window.offsets[a], window.offsets[b]
                if first is not None and last is not None and a <= b < a + 30 and s[a] + e[b] > best[i][0]:
                    best[i] = (s[a] + e[b], columns["context"][i][first[0] : last[1]])
    expected = ["" if null[i] > score else text for i, (score, text) in enumerate(best)]
    found = SpanMetrics(flat).answers(starts, ends)
    assert found == expected
    right = [float(squad(a) == squad((t["text"] or [""])[0])) for a, t in zip(found, answers, strict=True)]
    assert score_spans(found, flat.answers)["exact_match"] == pytest.approx(np.mean(right))


def pairs(answers: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [{"text": t, "answer_start": s} for t, s in zip(answers["text"], answers["answer_start"], strict=True)]

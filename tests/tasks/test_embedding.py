"""`hf-lora train --task embedding`: the metrics are those of sentence-transformers, whose classes load the result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import needs_peft, run_command, write_lines
from tiny import OTHERS, TEXTS, bert_of_texts
from transformers import BitsAndBytesConfig

from hf_lora import DataError, finetune
from hf_lora.data.tables import Table
from hf_lora.tasks.base import Given, Options
from hf_lora.tasks.registry import TASKS
from hf_lora.train.build import build_trainer
from hf_lora.train.parsing import parse_arguments
from hf_lora.train.run_data import read_data

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


@needs_peft("0.20", "loads the base alone where transformers asks it for an adapter of a model without a head")
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
    plan = run_command("train", "--model", texts_base, "--train-file", file, "--dry-run", *FAST).stdout
    trained, steps = re.search(r"([\d,]+) trained .* (\d+) steps", said.stdout).groups()  # type: ignore[union-attr]
    assert re.search(rf"^{trained} of [\d,]+ parameters would be trained .* in {steps} steps$", plan, re.M)
    assert "and the activations of a batch, which are not forecast" in plan
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


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_embeddings_over_a_quantized_base(bits: int, tmp_path: Path) -> None:
    """The vectors are those of PEFT's adapter over a base that transformers quantizes."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    file, out = write_lines(tmp_path / "pairs.jsonl", PAIRS * 3), tmp_path / "out"
    base = bert_of_texts(tmp_path / "bert", width=128)  # a multiple of the blocks
    words = ["--model", base, "--train-file", str(file), "--output-dir", str(out), f"--load-in-{bits}bit"]
    trained = finetune(parse_arguments([*words, *FAST])).model
    weight = trained[0].auto_model.encoder.layer[0].attention.self.query.weight
    assert weight.numel() * weight.itemsize < 4 * 128 * 128  # bytes of float32
    more = {"load_in_8bit": True}
    if bits == 4:
        more = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    options = {"quantization_config": BitsAndBytesConfig(**more), "device_map": "cpu", "dtype": torch.float32}
    plain = st.SentenceTransformer(base, model_kwargs=options)
    before = torch.tensor(plain.encode(TEXTS))
    plain[0].auto_model = peft.PeftModel.from_pretrained(plain[0].auto_model, out).base_model.model
    expected = torch.tensor(plain.encode(TEXTS))
    assert torch.allclose(torch.tensor(trained.encode(TEXTS)), expected, atol=2e-2)  # its kernels use 16 bits
    assert (expected - before).abs().max() > 0.1


def test_an_old_peft_that_would_load_the_base_alone_is_a_warning(
    texts_base: str, tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_lora import versions

    own = versions.installed
    file = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    words = ["--model", texts_base, "--train-file", str(file), "--output-dir", str(tmp_path / "out"), *FAST]
    for version, said in (("0.19.1", True), ("0.20.0", False)):
        fake = lambda name, version=version: version if name == "peft" else own(name)  # noqa: E731
        monkeypatch.setattr(versions, "installed", fake)
        messages.clear()
        parsed = parse_arguments(words)
        build_trainer(parsed, read_data(parsed))
        assert any("pip install 'peft>=0.20'" in message for message in messages) == said


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

"""`build_classifier` and `start_head`: files come from where they were asked for, and only a new head is started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import randomize
from tiny import TEXTS, bert_of_texts
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding

from hf_lora import (
    ConfigError,
    LoraConfig,
    LoraModel,
    apply_lora,
    build_classifier,
    save_as_sentence_transformer,
    start_head,
)
from hf_lora.pooled.pooling import Dense, Pooling

OLD, NEW = "a" * 40, "b" * 40
REPO = "someone/encoder"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bert_of_texts(tmp_path_factory.mktemp("texts") / "bert")


@pytest.fixture
def cache(base: str, tmp_path: Path) -> dict[str, str]:
    """The arguments that find a repository of two commits, of which the newer one is `main`."""
    repo = tmp_path / "cache" / f"models--{REPO.replace('/', '--')}"
    for commit in (OLD, NEW):
        shutil.copytree(base, repo / "snapshots" / commit)
        shutil.copytree(base, repo / "snapshots" / commit / "inner")
    for folder, value in (("snapshots/" + OLD, 1.0), ("snapshots/" + NEW, 2.0), (f"snapshots/{NEW}/inner", 3.0)):
        body = AutoModel.from_pretrained(base)
        torch.nn.init.constant_(body.get_input_embeddings().weight, value)
        body.save_pretrained(repo / folder)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(NEW)
    return {"cache_dir": str(tmp_path / "cache")}


def mark(model: Any) -> float:
    return float(model.get_input_embeddings().weight[0, 0])


@pytest.mark.parametrize("pooling", ["own", "mean"])
def test_the_weights_are_of_the_asked_commit_and_folder(pooling: str, cache: dict[str, str]) -> None:
    def built(**where: str) -> float:
        return mark(build_classifier(REPO, 3, pooling=pooling, **cache, **where))  # type: ignore[arg-type]

    assert [built(), built(revision=OLD), built(subfolder="inner")] == [2.0, 1.0, 3.0]


def test_a_declaration_is_read_at_the_asked_commit(cache: dict[str, str]) -> None:
    folder = Path(cache["cache_dir"], f"models--{REPO.replace('/', '--')}", "snapshots", OLD)
    declare(folder, ["max"])
    assert build_classifier(REPO, 3, revision=OLD, **cache).config.pooling["modes"] == ["max"]
    assert not hasattr(build_classifier(REPO, 3, **cache).config, "pooling")


def test_an_adapter_finds_the_commit_that_it_was_trained_on(
    cache: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache["cache_dir"])
    main = Path(cache["cache_dir"], f"models--{REPO.replace('/', '--')}", "refs", "main")
    main.write_text(OLD)
    model = apply_lora(build_classifier(REPO, 3, pooling="mean"), LoraConfig(r=2))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    main.write_text(NEW)
    assert mark(LoraModel.from_pretrained(tmp_path / "adapter")) == 1.0


def declare(folder: Path, modes: list[str]) -> None:
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    rows = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps([{"idx": i, "name": str(i), **row} for i, row in enumerate(rows)]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"embedding_dimension": 32, "pooling_mode": modes}))


@pytest.mark.parametrize("modes", [["mean", "cls"], ["cls", "mean"], ["max", "max"]])
def test_an_export_keeps_the_order_of_the_modes(modes: list[str], base: str, tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    source = tmp_path / "source"
    shutil.copytree(base, source)
    declare(source, modes)
    model, tokenizer = build_classifier(source, 3).eval(), AutoTokenizer.from_pretrained(base)
    randomize(model.pooled_classifier)
    save_as_sentence_transformer(model, tokenizer, tmp_path / "export")
    with torch.no_grad():
        logits = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    encoded = st.SentenceTransformer(str(tmp_path / "export"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(encoded, logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max()))


def rows_of(base: str) -> tuple[list[dict[str, Any]], Any]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [{**tokenizer(text), "labels": i % 3} for i, text in enumerate(TEXTS)]
    return rows, DataCollatorWithPadding(tokenizer)


def test_a_saved_head_is_kept_only_for_its_own_pooling_and_number_of_labels(base: str, tmp_path: Path) -> None:
    model = build_classifier(base, 3, pooling="mean")
    randomize(model.pooled_classifier)
    model.save_pretrained(tmp_path / "saved")
    saved = model.pooled_classifier.out_proj.weight
    rows, collator = rows_of(base)
    for labels, pooling, kept in ((["x", "y", "z"], None, True), (["x", "y", "z"], "cls", False), (4, None, False)):
        found = build_classifier(tmp_path / "saved", labels, pooling=pooling)
        weight = found.pooled_classifier.out_proj.weight
        assert (weight.shape == saved.shape and torch.equal(weight, saved)) == kept
        assert torch.isfinite(weight).all()
        assert found.config.pooling["modes"] == [pooling or "mean"]
        if not kept:
            start_head(found, rows, collator=collator, progress=False)


def test_dense_layers_that_no_file_holds_are_new(base: str) -> None:
    model = build_classifier(base, 3, pooling=Pooling(("mean",), (Dense(32, 16),)))
    assert model.pooled_classifier.dense[0].weight.std() > 0


def test_a_head_that_does_not_run_is_not_started(base: str) -> None:
    rows, collator = rows_of(base)
    model = apply_lora(build_classifier(base, 3, pooling="mean"), LoraConfig(r=2), "a")
    model.add_adapter("b", LoraConfig(r=2))
    model.set_adapter("a")
    with pytest.raises(ConfigError, match="Activate its adapter"):
        start_head(model, rows, collator=collator, progress=False)
    model.set_adapter("b")
    start_head(model, rows, collator=collator, progress=False)


def test_a_dataset_without_the_column_is_told_its_name(base: str) -> None:
    rows, collator = rows_of(base)
    data = Dataset.from_list(rows).rename_column("labels", "label")
    with pytest.raises(ConfigError, match="label_column"):
        start_head(build_classifier(base, 3, pooling="mean"), data, collator=collator, progress=False)

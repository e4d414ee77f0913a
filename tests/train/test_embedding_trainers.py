"""Adapters inside models of sentence-transformers: cached losses, dense modules, files that a fresh process opens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import needs_peft, randomize
from tiny import OTHERS, TEXTS, bert_of_texts
from torch import Tensor

from hf_lora import (
    AdapterFileError,
    LoraConfig,
    LoraCrossEncoderTrainer,
    LoraCrossEncoderTrainingArguments,
    LoraModel,
    LoraSentenceTransformerTrainer,
    LoraSentenceTransformerTrainingArguments,
    apply_lora,
)

st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("peft")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
datasets = pytest.importorskip("datasets")
PAIRS = datasets.Dataset.from_dict({"anchor": TEXTS[:4], "positive": OTHERS[:4]})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bert_of_texts(tmp_path_factory.mktemp("embedding") / "bert")


def embedder(base: str, dense: bool = False, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    parts = [modules.Transformer(base), modules.Pooling(32)]
    for layer in parts[0].modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = dropout
    return st.SentenceTransformer(modules=parts + [modules.Dense(32, 16)] * dense, device="cpu")


def made(model: Any, folder: Path, **settings: Any) -> Any:
    values: dict[str, Any] = {
        "max_steps": 4, "save_steps": 2, "save_strategy": "steps", "learning_rate": 1e-2, "lora_r": 4,
        "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    args = LoraSentenceTransformerTrainingArguments(str(folder), **values | settings)
    loss = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [8, 4])
    return LoraSentenceTransformerTrainer(model, args, train_dataset=PAIRS, loss=loss)


def gradients(loss: Any, features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    loss.model.zero_grad()
    loss([dict(feature) for feature in features], None).backward()
    return {n: p.grad.clone() for n, p in loss.model.named_parameters() if p.grad is not None}


class InParts(torch.nn.Module):
    """The loss of which the cached one is a rearrangement: the same parts of the batch, with one graph."""

    def __init__(self, model: Any, size: int) -> None:
        super().__init__()
        self.model, self.size, self.whole = model, size, losses.MultipleNegativesRankingLoss(model)

    def forward(self, features: list[dict[str, Tensor]], labels: Any) -> Tensor:
        def embed(feature: dict[str, Tensor], first: int) -> Tensor:
            rows = slice(first, first + self.size)
            return self.model({name: value[rows] for name, value in feature.items()})["sentence_embedding"]

        parts = [torch.cat([embed(f, i) for i in range(0, len(f["input_ids"]), self.size)]) for f in features]
        return self.whole.compute_loss_from_embeddings(parts, labels)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_cached_gradients_are_those_of_the_whole_batch(dropout: float, base: str) -> None:
    """With dropout, of the adapter and of the base: the second forward repeats the masks of the first."""
    model = embedder(base, dropout=dropout)
    randomize(apply_lora(model[0].auto_model, LoraConfig(r=4, lora_dropout=dropout)))
    model.train()
    features = [
        {name: value for name, value in model.preprocess(texts).items() if isinstance(value, Tensor)}
        for texts in (TEXTS[:4:2] + OTHERS[:4:2], OTHERS[:4:2] + TEXTS[:4:2])  # no padding, which parts leave out
    ]
    plain: Any = InParts(model, 2) if dropout else losses.MultipleNegativesRankingLoss(model)
    cached = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    expected, found = (gradients(loss, features) for loss in (plain, cached))
    assert expected.keys() == found.keys()
    assert len(found) == 24  # A and B of six layers of two blocks
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm() + 1e-9, name


@needs_peft("0.20", "loads the base alone where transformers asks it for an adapter of a model without a head")
def test_modules_outside_the_transformers_model_are_trained_whole_and_kept(base: str, tmp_path: Path) -> None:
    """By its own `save_pretrained`, and in checkpoints, from which a run goes on to the same bits."""
    model = embedder(base, dense=True)
    before = model[2].linear.weight.detach().clone()
    run = made(model, tmp_path / "run", head_learning_rate=3e-2)
    assert isinstance(model[0].auto_model, LoraModel)
    outside = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert outside == {"2.linear.weight", "2.linear.bias"}
    run.train()
    assert not torch.equal(model[2].linear.weight, before)
    rates = {id(p): group["initial_lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert [name for name, p in model.named_parameters() if rates.get(id(p)) == 3e-2] == sorted(outside)[::-1]
    expected = model.encode(TEXTS, convert_to_tensor=True)
    run.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "2_Dense" / "model.safetensors").exists()
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    for folder in ("saved", "run/checkpoint-4"):
        again = st.SentenceTransformer(str(tmp_path / folder), device="cpu")
        assert torch.allclose(again.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-5, atol=1e-6)

    resumed = made(embedder(base, dense=True), tmp_path / "resumed", head_learning_rate=3e-2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(resumed.model.encode(TEXTS, convert_to_tensor=True), expected)
    other = made(embedder(base), tmp_path / "other")
    values = {name: p.detach().clone() for name, p in other.model.named_parameters()}
    with pytest.raises(AdapterFileError, match=r"2\.linear\.weight: the model has no such tensor.*\(16, 32\)"):
        other._checkpoints.load_adapters(str(tmp_path / "run" / "checkpoint-4"), other._adapted_model)
    assert all(torch.equal(p, values[name]) for name, p in other.model.named_parameters())


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    """The folder of an embedding model and a reranker, and their outputs."""
    folder = tmp_path_factory.mktemp("trained")
    run = made(embedder(base, dense=True), folder / "embedding", save_strategy="no")
    run.train()
    run.save_model()
    torch.manual_seed(0)
    ranker = st.CrossEncoder(base, num_labels=1, device="cpu")
    args = LoraCrossEncoderTrainingArguments(
        str(folder / "ranking"), max_steps=3, learning_rate=1e-2, lora_r=4, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"a": TEXTS, "b": OTHERS, "label": [0.8, 0.6, 0.7, 0.1] * 2})
    other = LoraCrossEncoderTrainer(ranker, args, train_dataset=rows)
    pairs = list(zip(TEXTS, OTHERS, strict=True))
    before = ranker.predict(pairs, convert_to_tensor=True)
    other.train()
    other.save_model()
    assert (ranker.predict(pairs, convert_to_tensor=True) - before).abs().min() > 1e-3
    return folder, run.model.encode(TEXTS, convert_to_tensor=True), ranker.predict(pairs, convert_to_tensor=True)


FRESH = """
import sys, torch
import sentence_transformers as st
from tiny import OTHERS, TEXTS
embedding = st.SentenceTransformer(sys.argv[1] + "/embedding", device="cpu")
ranking = st.CrossEncoder(sys.argv[1] + "/ranking", device="cpu")
pairs = list(zip(TEXTS, OTHERS, strict=True))
assert "hf_lora" not in sys.modules
torch.save([embedding.encode(TEXTS, convert_to_tensor=True), ranking.predict(pairs, convert_to_tensor=True)],
           sys.argv[1] + "/outputs.pt")
"""


@pytest.mark.slow
def test_a_fresh_process_computes_the_same(trained: tuple[Path, Tensor, Tensor]) -> None:
    """With sentence-transformers and PEFT only."""
    folder, *expected = trained
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder)], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for found, values in zip(torch.load(folder / "outputs.pt"), expected, strict=True):
        assert torch.allclose(found, values, rtol=1e-5, atol=1e-6)

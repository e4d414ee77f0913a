"""Trainers of wrappers around a transformers model, as in sentence-transformers: the adapter is that model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors, snapshot
from tiny import OTHERS, TEXTS, bert_of_texts, tiny_bert
from torch import Tensor, nn
from transformers import BertForSequenceClassification, Trainer

from hf_lora import LoraConfig, LoraModel, LoraTrainerMixin, StateError, apply_lora
from hf_lora.adapt.state import state_of
from hf_lora.adapt.walk import adapter_layers
from hf_lora.testing import LocalHub

ROWS = [{"ids": torch.arange(i, i + 6), "labels": torch.tensor(i % 3)} for i in range(12)]


class Wrapper(nn.Module):
    """Computes its own loss, and saves its parts itself."""

    def __init__(self, inner: Any, own: bool = False) -> None:
        super().__init__()
        self.inner = inner
        if own:
            self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.inner(input_ids=ids).logits
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def save_pretrained(self, folder: str) -> None:
        self.inner.save_pretrained(folder)
        Path(folder, "parts.txt").write_text("inner")


class WrapperTrainer(Trainer):
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.model.save_pretrained(output_dir or self.args.output_dir)


class LoraWrapperTrainer(LoraTrainerMixin, WrapperTrainer):
    pass


class PlainLoraTrainer(LoraTrainerMixin, Trainer):
    """Its own `_save` is Trainer's, which would write the whole model."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrapped") / "base"
    tiny_bert().save_pretrained(folder)
    return folder


def loaded(base: Path) -> Any:
    return BertForSequenceClassification.from_pretrained(base)


@pytest.mark.parametrize(("given", "trainer"), [(False, LoraWrapperTrainer), (True, PlainLoraTrainer)])
def test_the_adapter_is_that_of_the_model_inside(
    given: bool, trainer: type, base: Path, arguments: Callable[..., Any], tmp_path: Path
) -> None:
    values = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "lora_r": 4}
    runs = []
    for name, start in (("whole", None), ("resumed", "checkpoint-2")):
        inner = loaded(base)
        if given:
            apply_lora(inner, LoraConfig(r=4))
        run = trainer(Wrapper(inner), arguments(name=name, **values), train_dataset=ROWS)
        assert isinstance(run.model.inner, LoraModel)
        assert state_of(run.model) is None
        run.train(resume_from_checkpoint=start and str(Path(runs[0].args.output_dir, start)))
        runs.append(run)
    wrapper = runs[0].model
    guard = runs[0].guard
    guard.on_train_begin(runs[0].args, runs[0].state, runs[0].control, model=wrapper)
    assert len(guard.watched) == len(adapter_layers(wrapper.inner))
    guard.finished()
    assert_same_tensors(snapshot(runs[1].model), snapshot(wrapper))
    folder = Path(runs[0].args.output_dir, "checkpoint-4")
    assert not (folder / "model.safetensors").exists()
    assert (folder / "parts.txt").exists() is (trainer is LoraWrapperTrainer)
    runs[0].save_model(str(tmp_path / "saved"))
    wrapper.save_pretrained(str(tmp_path / "own"))
    ids = ROWS[0]["ids"][None]
    expected = wrapper.eval().inner(input_ids=ids).logits
    for saved in (folder, tmp_path / "saved", tmp_path / "own"):
        again = LoraModel.from_pretrained(saved)
        assert torch.equal(again(input_ids=ids).logits, expected), saved
    more = trainer(Wrapper(loaded(base)), arguments(name="more", lora_adapter=str(folder)), train_dataset=ROWS)
    assert torch.equal(more.model.eval().inner(input_ids=ids).logits, expected)


def test_a_wrapper_with_parameters_is_adapted_as_a_whole(base: Path, arguments: Callable[..., Any]) -> None:
    """The file of the inner model would lack them."""
    run = PlainLoraTrainer(Wrapper(loaded(base), own=True), arguments(max_steps=1), train_dataset=ROWS)
    assert state_of(run.model) is not None
    assert not run.model.scale.requires_grad
    run.train()
    inner = apply_lora(loaded(base), LoraConfig(r=4))
    with pytest.raises(StateError, match="inner already has adapters"):
        PlainLoraTrainer(Wrapper(inner, own=True), arguments(), train_dataset=ROWS)


def test_wrappers_of_torch_are_refused_as_before(base: Path, arguments: Callable[..., Any]) -> None:
    for wrap in (torch.compile, nn.DataParallel):
        for model in (loaded(base), apply_lora(loaded(base), LoraConfig(r=4))):
            with pytest.raises(StateError, match=r"compiled|data parallelism"):
                PlainLoraTrainer(wrap(model), arguments(), train_dataset=ROWS)


@pytest.fixture(scope="module")
def texts_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bert_of_texts(tmp_path_factory.mktemp("texts") / "bert")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embeddings", "pairs"])
def test_a_training_of_sentence_transformers(kind: str, texts_base: str, tmp_path: Path) -> None:
    """Its own classes load what is saved at any time, with the same values; the reference is PEFT, which they use."""
    st = pytest.importorskip("sentence_transformers")
    pytest.importorskip("peft")
    from datasets import Dataset
    from sentence_transformers import cross_encoder, sentence_transformer

    rows = {"sentence1": TEXTS, "sentence2": OTHERS, "label": [0.8, 0.6, 0.7, 0.1] * 2}
    if kind == "pairs":
        base, own = st.CrossEncoder, cross_encoder.CrossEncoderTrainer
        args: Any = cross_encoder.CrossEncoderTrainingArguments
        make_loss: Any = cross_encoder.losses.BinaryCrossEntropyLoss
        torch.manual_seed(0)
        base(texts_base, num_labels=1, device="cpu").save_pretrained(str(tmp_path / "base"))
    else:
        base, own = st.SentenceTransformer, st.SentenceTransformerTrainer
        args = st.SentenceTransformerTrainingArguments
        make_loss = sentence_transformer.losses.CosineSimilarityLoss
        base(texts_base, device="cpu").save_pretrained(str(tmp_path / "base"))

    def values(model: Any) -> Tensor:
        return torch.tensor(
            model.predict(list(zip(TEXTS, OTHERS, strict=True))) if kind == "pairs" else model.encode(TEXTS)
        )

    def made(name: str) -> Any:
        model = base(str(tmp_path / "base"), device="cpu")
        given = args(
            str(tmp_path / name), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
            report_to=[], disable_tqdm=True, save_strategy="steps", save_steps=2,
        )  # fmt: skip
        trainer: Any = type("OurTrainer", (LoraTrainerMixin, own), {})
        return trainer(
            model=model, args=given, train_dataset=Dataset.from_dict(rows), loss=make_loss(model), lora_config={"r": 4}
        )

    run = made("run")
    before = values(run.model)
    run.train()
    expected = values(run.model)
    assert not torch.allclose(before, expected, rtol=1e-3)
    run.save_model(str(tmp_path / "saved"))
    run.model.save_pretrained(str(tmp_path / "own"))
    for folder in ("saved", "own", "run/checkpoint-4"):
        found = values(base(str(tmp_path / folder), device="cpu"))
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6), folder
    with LocalHub() as hub, hub.active(tmp_path / "home"):
        run.args.hub_model_id, run.args.hub_token = "user/pushed", hub.token
        run.push_to_hub()
        for path, data in hub.files("user/pushed").items():
            (tmp_path / "pulled" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "pulled" / path).write_bytes(data)
    assert (tmp_path / "pulled" / "modules.json").is_file()
    found = values(base(str(tmp_path / "pulled"), device="cpu"))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    resumed = made("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(values(resumed.model), expected)

"""Metrics against scikit-learn, and perplexity against float64."""

from __future__ import annotations

from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from tiny import texts, tiny_gpt2
from transformers import EvalPrediction

from hf_lora import LoraTrainer
from hf_lora.errors import ConfigError
from hf_lora.evaluation.answers import ANSWER_METRICS
from hf_lora.evaluation.metrics import METRICS, build_compute_metrics, load_metric

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("weights", [None, RNG.random(50)])
@pytest.mark.parametrize("classes", [2, 5])
def test_accuracy_and_f1_equal_sklearn(classes: int, weights: Any) -> None:
    found, true = RNG.integers(0, classes, 50), RNG.integers(0, classes, 50)
    result = load_metric("accuracy").compute(predictions=found, references=true, sample_weight=weights)
    assert list(result) == ["accuracy"]
    assert result["accuracy"] == pytest.approx(accuracy_score(true, found, sample_weight=weights), abs=1e-12)
    for average in ["micro", "macro", "weighted", None, *(["binary"] if classes == 2 else [])]:
        result = load_metric("f1").compute(predictions=found, references=true, average=average, sample_weight=weights)
        assert list(result) == ["f1"]
        expected = f1_score(true, found, average=average, sample_weight=weights)
        np.testing.assert_allclose(result["f1"], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("found", "true"), [([0, 0], [0, 0]), ([1, 1], [0, 0]), ([0, 2], [0, 1]), ([2], [2]), ([0, 1, 2], [2, 1, 0])]
)
@pytest.mark.parametrize("average", ["micro", "macro", "weighted"])
def test_f1_where_classes_are_missing(found: list[int], true: list[int], average: str) -> None:
    result = load_metric("f1").compute(predictions=found, references=true, average=average)
    assert result["f1"] == pytest.approx(f1_score(true, found, average=average, zero_division=0))


def test_binary_f1_of_many_classes_is_refused_as_by_sklearn() -> None:
    with pytest.raises(ValueError, match="macro"):
        load_metric("f1").compute(predictions=[0, 1, 2], references=[0, 1, 2])


def test_f1_labels_and_pos_label() -> None:
    found, true = RNG.integers(0, 4, 60), RNG.integers(0, 4, 60)
    result = load_metric("f1").compute(predictions=found, references=true, labels=[1, 3], average="macro")
    assert result["f1"] == pytest.approx(f1_score(true, found, labels=[1, 3], average="macro"))
    found, true = found % 2, true % 2
    result = load_metric("f1").compute(predictions=found, references=true, pos_label=0)
    assert result["f1"] == pytest.approx(f1_score(true, found, pos_label=0))


@pytest.mark.parametrize("classes", [2, 4])
def test_classification(classes: int) -> None:
    logits, labels = RNG.normal(size=(40, classes)).astype("float32"), RNG.integers(0, classes, 40)
    metric = build_compute_metrics(["accuracy", "f1"])
    kept = metric.preprocess_logits_for_metrics(torch.tensor(logits), torch.tensor(labels))
    assert kept.shape == (40,)
    expected = {
        "accuracy": accuracy_score(labels, logits.argmax(-1)),
        "f1": f1_score(labels, logits.argmax(-1), average="binary" if classes == 2 else "macro"),
    }
    for predictions in (kept.numpy(), logits, (logits, np.zeros((40, 3)))):
        assert metric(EvalPrediction(predictions, labels)) == pytest.approx(expected)


def test_batches_give_the_same_as_one_call() -> None:
    logits, labels = RNG.normal(size=(30, 3)).astype("float32"), RNG.integers(0, 3, 30)
    metric = build_compute_metrics(["accuracy", "f1"])
    whole = metric(EvalPrediction(logits, labels))
    assert metric(EvalPrediction(logits[:10], labels[:10]), compute_result=False) == {}
    assert metric(EvalPrediction(logits[10:], labels[10:]), compute_result=True) == whole


def test_ignored_labels_do_not_count() -> None:
    logits, labels = RNG.normal(size=(4, 6, 3)).astype("float32"), RNG.integers(0, 3, (4, 6))
    labels[:, :2] = -100
    result = build_compute_metrics("accuracy")(EvalPrediction(logits, labels))
    assert result["accuracy"] == pytest.approx(accuracy_score(labels[:, 2:].ravel(), logits.argmax(-1)[:, 2:].ravel()))
    shifted = build_compute_metrics("accuracy", shift_labels=True)(EvalPrediction(logits, labels))
    keep = labels[:, 1:] != -100
    assert shifted["accuracy"] == pytest.approx(accuracy_score(labels[:, 1:][keep], logits.argmax(-1)[:, :-1][keep]))


def test_perplexity_is_that_of_the_models_own_loss() -> None:
    model = tiny_gpt2().eval()
    ids = torch.randint(4, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        logits, loss = model(ids, labels=labels).logits, model.double()(ids, labels=labels).loss
    metric = build_compute_metrics("perplexity")
    kept = metric.preprocess_logits_for_metrics(logits, labels)
    assert kept.shape == (3, 2)
    result = metric(EvalPrediction(kept.numpy(), labels.numpy()))
    assert result["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    rows = [model(ids[i : i + 1], labels=labels[i : i + 1]).loss.exp().item() for i in range(3)]
    assert result["mean_perplexity"] == pytest.approx(np.mean(rows), rel=1e-5)
    assert metric(EvalPrediction(logits.numpy(), labels.numpy())) == pytest.approx(result)
    both = build_compute_metrics(["perplexity", "accuracy"], shift_labels=True)
    kept = both.preprocess_logits_for_metrics(logits, labels)
    assert both(EvalPrediction(tuple(k.numpy() for k in kept), labels.numpy())).keys() == {*result, "accuracy"}


def test_what_cannot_be_computed_is_said() -> None:
    with pytest.raises(ConfigError, match="multi-label"):
        build_compute_metrics("accuracy").preprocess_logits_for_metrics(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="generated text"):
        build_compute_metrics("accuracy")(EvalPrediction(np.zeros((2, 5), dtype=int), np.zeros((2, 7), dtype=int)))
    with pytest.raises(ConfigError, match="accuracy, f1, perplexity"):
        load_metric("no_such_metric_anywhere")


def test_a_function_is_returned_and_a_script_is_loaded(tmp_path: Any) -> None:
    def own(prediction: Any) -> dict[str, float]:
        return {"own": 1.0}

    assert build_compute_metrics(own) is own
    (tmp_path / "zeros").mkdir()
    (tmp_path / "zeros" / "zeros.py").write_text(
        "import datasets\nimport evaluate\n"
        "class Zeros(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        whole = datasets.Value('int64')\n"
        "        f = datasets.Features({'predictions': whole, 'references': whole})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=f)\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'zeros': sum(p == 0 for p in predictions)}\n"
    )
    metric = build_compute_metrics(str(tmp_path / "zeros"))
    assert metric(EvalPrediction(np.array([0, 1, 0]), np.array([0, 0, 0]))) == {"zeros": 2}


def test_metrics_of_the_table_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load", lambda name: pytest.fail(f"{name} was looked for"))
    for name in METRICS:
        assert load_metric(name).name == name
    assert load_metric("accuracy").compute(predictions=[1], references=[1]) == {"accuracy": 1.0}
    with pytest.raises(ValueError, match="the same shape"):
        load_metric("accuracy").compute(predictions=[1, 1], references=[1])


def test_an_entry_of_the_table_is_a_metric_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        METRICS, "wrong", lambda predictions, references: {"wrong": int((predictions != references).sum())}
    )
    logits, labels = RNG.normal(size=(9, 3)).astype("float32"), RNG.integers(0, 3, 9)
    result = build_compute_metrics(["accuracy", "wrong"])(EvalPrediction(logits, labels))
    assert result["wrong"] == round(9 * (1 - result["accuracy"]))


def test_a_metric_that_fails_leaves_nothing_for_the_next_evaluation() -> None:
    metric = build_compute_metrics("f1", average="binary")
    with pytest.raises(ValueError, match="macro"):
        metric(EvalPrediction(np.array([0, 1, 2]), np.array([0, 1, 2])))
    assert metric(EvalPrediction(np.array([0, 1]), np.array([0, 1]))) == {"f1": 1.0}


def test_a_metric_of_texts_is_refused_for_token_ids() -> None:
    with pytest.raises(ConfigError, match=r"exact_match and field_f1 compare texts.*generate=True"):
        build_compute_metrics(["accuracy", *ANSWER_METRICS])


@pytest.mark.parametrize("names", [["accuracy"], ["accuracy", "perplexity"]])
def test_batches_that_trainer_does_not_concatenate(names: list[str], arguments: Any) -> None:
    model = tiny_gpt2()
    results = []
    for concatenated in (True, False):
        args = arguments(eval_do_concat_batches=concatenated, per_device_eval_batch_size=5)
        trainer = LoraTrainer(model, args, eval_dataset=texts(), compute_metrics=build_compute_metrics(names))
        found = trainer.evaluate()
        results.append({name: found[f"eval_{name}"] for name in names})
    assert results[1] == pytest.approx(results[0])


def test_errors_of_numbers_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import mean_absolute_error, mean_squared_error, root_mean_squared_error

    found, true = np.random.default_rng(0).normal(size=(2, 37))
    compute = build_compute_metrics(["mse", "mae"])
    logits, labels = torch.tensor(found).unsqueeze(-1), torch.tensor(true)
    kept = compute.preprocess_logits_for_metrics(logits, labels)
    expected = {"mse": mean_squared_error(true, found), "mae": mean_absolute_error(true, found)}
    assert compute(EvalPrediction(kept.numpy(), true)) == pytest.approx(expected, rel=1e-12)
    root = build_compute_metrics("mse", squared=False)(EvalPrediction(found, true))
    assert root["mse"] == pytest.approx(root_mean_squared_error(true, found), rel=1e-12)

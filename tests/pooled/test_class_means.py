"""The start of a head at the class means, against a slow computation."""

from __future__ import annotations

import pytest
import torch
from pooled.conftest import LABELS, logits, tokens
from tiny import TEXTS

import hf_lora
from hf_lora import ConfigError, build_classifier
from hf_lora.pooled.head_start import class_means


def test_a_head_that_is_new_has_finite_weights_of_its_own_scale(declared: dict[str, str]) -> None:
    weight = build_classifier(declared["normalized"], 500).pooled_classifier.out_proj.weight
    assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_the_class_means_are_those_of_a_slow_computation() -> None:
    torch.manual_seed(0)
    classes, width = 5, 8
    labels = torch.randint(0, classes, (60,))
    features = torch.randn(classes, width).double()[labels] + torch.randn(60, width).double() * 0.7 + 3.0
    weight, bias, loss = class_means(features, labels, classes)
    means = torch.stack([features[labels == c].mean(0) for c in range(classes)])
    # All differences of logits are those of -s/2 |f - m|^2, with one s.
    found = features @ weight.T + bias
    exact = -(features[:, None] - means).square().sum(-1) / 2
    steps, expected = found - found[:, :1], exact - exact[:, :1]
    scale = float((steps * expected).sum() / expected.square().sum())
    torch.testing.assert_close(steps, scale * expected, rtol=1e-9, atol=1e-9)
    total = 0.0
    for i, (row, label) in enumerate(zip(features, labels, strict=True)):
        others = means.clone()
        others[label] = features[[j for j in range(60) if j != i and labels[j] == label]].mean(0)
        values = -scale * (row - others).square().sum(-1) / 2
        total -= float(values.log_softmax(0)[label])
    assert loss == pytest.approx(total / 60, rel=1e-9)
    assert loss < torch.log(torch.tensor(classes)).item()


def test_useless_features_give_chance_and_a_lone_row_is_no_certainty() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(300, 4).double(), torch.randint(0, 3, (300,))
    assert class_means(features, labels, 3)[2] < 1.1
    weight, bias, loss = class_means(torch.randn(3, 4).double(), torch.arange(3), 3)
    assert torch.isfinite(weight).all()
    assert torch.isfinite(bias).all()
    assert loss < 1.1
    weight, bias, _ = class_means(
        torch.ones(6, 4).double(), torch.arange(6) % 3, 4
    )  # all equal, one class without rows
    assert torch.isfinite(weight).all()
    assert torch.isfinite(bias).all()


def test_features_that_hardly_differ_do_not_make_a_steep_head() -> None:
    torch.manual_seed(0)
    labels = torch.arange(40) % 2
    features = torch.ones(40, 8).double() + 1e-6 * (torch.randn(40, 8).double() + 3 * labels[:, None])
    weight, _bias, loss = class_means(features, labels, 2)
    changed = features + 0.01 * torch.randn(40, 8).double()
    assert float(((changed - features) @ weight.T).abs().max()) < 5.0
    assert loss <= 0.7


def test_start_head_keeps_modes_and_random_numbers_and_refuses_what_it_cannot_do(declared: dict[str, str]) -> None:
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

    tokenizer, _ = tokens(declared["normalized"])
    rows = [{**tokenizer(text), "labels": i % 3} for i, text in enumerate(TEXTS[:3] * 4)]
    model = build_classifier(declared["normalized"], LABELS).train()
    model.bert.encoder.eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loss = hf_lora.start_head(model, rows, collator=DataCollatorWithPadding(tokenizer), progress=False)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert not model.bert.encoder.training
    assert not model.bert.encoder.layer[0].training
    assert loss < 0.3
    batch = {k: v for k, v in DataCollatorWithPadding(tokenizer)(rows[:3]).items() if k != "labels"}
    assert logits(model, batch).argmax(1).tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match="0 to 2"):
        hf_lora.start_head(model, [{**row, "labels": 5} for row in rows])
    for wrong in ("a", 0.5, None, torch.tensor([0, 1])):
        with pytest.raises(ConfigError, match=r"0 to 2; \d+ of \d+ labels are not"):
            hf_lora.start_head(model, [{**row, "labels": wrong} for row in rows])
    with pytest.raises(ConfigError, match="have no column 'label'"):
        hf_lora.start_head(model, rows, label_column="label")
    with pytest.raises(ConfigError, match="there are no rows"):
        hf_lora.start_head(model, [])
    own = AutoModelForSequenceClassification.from_pretrained(declared["normalized"], num_labels=3)
    assert hf_lora.start_head(own, rows, collator=DataCollatorWithPadding(tokenizer), progress=False) < 1.1
    own.classifier = torch.nn.Conv1d(1, 3, 1)
    with pytest.raises(ConfigError, match="no new linear layer with 3 outputs"):
        hf_lora.start_head(own, rows)

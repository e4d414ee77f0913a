"""A new head of every classifier of texts starts at the class means."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import CASES
from transformers import AutoModelForSequenceClassification

from hf_lora.pooled.head_start import start_head


@pytest.mark.slow
def test_the_head_of_every_classifier_of_texts_can_start() -> None:
    """One model of each type that the sweep can build and transformers has a classifier for."""
    mapping: Any = AutoModelForSequenceClassification._model_mapping
    configs: dict[str, Any] = {config.model_type: config for config in (case.config() for case in CASES)}
    started = []
    for name, config in configs.items():
        if type(config) not in mapping:
            continue
        config.num_labels, config.pad_token_id = 3, getattr(config, "pad_token_id", None) or 0
        model = AutoModelForSequenceClassification.from_config(config).eval()
        if model.main_input_name != "input_ids":
            continue
        rows = [{"input_ids": torch.randint(5, 40, (8,)), "labels": i % 3} for i in range(12)]
        for row in rows:  # which the classifiers of encoder-decoders look for
            row["input_ids"][-1] = getattr(config, "eos_token_id", None) or 2
        assert start_head(model, rows, batch_size=4, progress=False) <= math.log(3) + 0.1
        started.append(name)
    assert len(started) > 30

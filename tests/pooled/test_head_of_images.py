"""The class means of a head for images, and heads whose logits are not those of one linear layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_resnet, why_no_images

import hf_lora
from hf_lora import ConfigError, start_head
from hf_lora.pooled.head_start import class_means
from hf_lora.train import build


def images(count: int = 24, size: int = 16) -> list[dict[str, Any]]:
    """Noise with one bright channel: the class."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        pixels = torch.randn(3, size, size, generator=generator) * 0.3
        pixels[i % 3] += 1
        rows.append({"pixel_values": pixels, "labels": i % 3})
    return rows


SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
    initializer_range=0.2, num_labels=3,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_head_of_an_image_classifier_starts_at_the_class_means(kind: str) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    rows = images()
    pixels, labels = torch.stack([row["pixel_values"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    model: Any = tiny_resnet() if kind == "resnet" else ViTForImageClassification(ViTConfig(**SIZES)).eval()
    with torch.no_grad():
        if kind == "vit":
            features = model.vit(pixels).last_hidden_state[:, 0]
        else:
            features = model.resnet(pixels).pooler_output.flatten(1)
    head = model.classifier if kind == "vit" else model.classifier[-1]
    weight, _, expected = class_means(features.double(), labels, 3)
    loss = start_head(model, rows, batch_size=7, progress=False)
    assert torch.allclose(head.weight.double(), weight, rtol=1e-3, atol=1e-5)
    assert abs(loss - expected) < 1e-3
    with torch.no_grad():
        found = torch.nn.functional.cross_entropy(model(pixels).logits, labels)
    assert found < math.log(3)


def test_logits_of_two_heads_are_refused_and_left_as_they_are() -> None:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    model = DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match="not those of the last linear layer"):
        start_head(model, images(6), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A folder of a model without a head, and one of images."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    image = pytest.importorskip("PIL.Image")
    folder, pictures = tmp_path_factory.mktemp("vision"), tmp_path_factory.mktemp("pictures")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZES)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    if reason := why_no_images(folder):
        pytest.skip(reason)
    for i in range(12):
        (pictures / "ab"[i % 2]).mkdir(exist_ok=True)
        image.new("RGB", (16, 16), (20 * i, 0, 250 * (i % 2))).save(pictures / "ab"[i % 2] / f"{i}.png")
    return str(folder), str(pictures)


def test_a_run_starts_the_head_and_says_so(
    vision: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    def run(name: str, **more: Any) -> str:
        hf_lora.finetune({
            "model": vision[0], "train_file": vision[1], "output_dir": str(tmp_path / name), "use_cpu": True,
            "disable_tqdm": True, "save_strategy": "no", "max_steps": 1, **more,
        }, lines.append)  # fmt: skip
        return lines[-1]

    assert "the head starts at the class means: loss " in run("means")
    assert "head starts" not in run("random", head_init="random")

    def refuse(*args: Any, **options: Any) -> float:
        raise ConfigError("start_head: no linear layer.")

    monkeypatch.setattr(build, "start_head", refuse)
    assert "the head starts at random: start_head: no linear layer." in run("other")
    with pytest.raises(ConfigError, match="no linear layer"):
        run("asked", head_init="class-means")

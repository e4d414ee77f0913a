"""`--load-in-4bit` and `--load-in-8bit`: the run over a quantized base, and what cannot be quantized."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_command, tiny_bert, tiny_llama
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from hf_lora import ConfigError, LoraModel
from hf_lora.train.build import build_trainer
from hf_lora.train.parsing import parse_arguments
from hf_lora.train.quantize import load_quantized
from hf_lora.train.run_data import read_data

pytest.importorskip("bitsandbytes")
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}  # a multiple of the blocks
FAST = (
    "--use-cpu", "--disable-tqdm", "true", "--save-strategy", "no", "--learning-rate", "1e-2", "--packing", "false",
    "--num-train-epochs", "2", "--logging-strategy", "no",
)  # fmt: skip


@pytest.fixture(scope="module")
def bases(bert_folder: str, llama_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("wide")
    tiny_llama(**WIDE).save_pretrained(folder / "llama")
    tiny_bert(**WIDE).bert.save_pretrained(folder / "bert")
    for name, source in (("llama", llama_folder), ("bert", bert_folder)):
        AutoTokenizer.from_pretrained(source).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("llama", "bert")}


def method(bits: int, **more: Any) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, **more)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, **more,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_language_model_is_trained_over_few_bits(
    bits: int, bases: dict[str, str], texts_folder: Path, tmp_path: Path, messages: list[str]
) -> None:
    """The loss of the run is that of the adapter over a base that transformers quantizes."""
    rows, out = texts_folder / "pairs.jsonl", tmp_path / "out"
    words = ("--model", bases["llama"], "--train-file", rows, "--test-file", rows, "--output-dir", out)
    said = run_command("train", *words, f"--load-in-{bits}bit", *FAST).stdout
    assert "precision: base bitsandbytes " + {4: "NF4", 8: "int8"}[bits] in said
    results = json.loads((out / "test_results.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(
        bases["llama"], quantization_config=method(bits), dtype=torch.float32, device_map="cpu"
    )
    model = LoraModel.from_pretrained(out, base_model=base, is_trainable=True).eval()
    total, count = 0.0, 0
    for row in read_data(parse_arguments([*map(str, words[:4]), "--output-dir", str(tmp_path), "--use-cpu"])).rows[
        "train"
    ]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], labels, reduction="sum")
        total, count = total + float(losses), count + int((labels != -100).sum())
    assert not any("half precision" in message for message in messages)
    assert results["test_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4 if bits == 4 else 2e-2)
    assert any(bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n)
    found = json.loads(run_command("eval", out, "--file", rows, "--json").stdout)
    assert found["perplexity"] == pytest.approx(results["test_perplexity"], rel=0.5)
    assert run_command("generate", out, "--prompt", "open the door", "--max-new-tokens", 3).exit_code == 0


@pytest.mark.parametrize("bits", [pytest.param(4, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("has_head", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_modules_that_are_trained_whole_stay_dense(
    bits: int, has_head: bool, bases: dict[str, str], texts_folder: Path, tmp_path: Path
) -> None:
    base = bases["bert"]
    if has_head:
        base = str(tmp_path / "base")
        AutoModelForSequenceClassification.from_pretrained(bases["bert"], num_labels=2).save_pretrained(base)
        AutoTokenizer.from_pretrained(bases["bert"]).save_pretrained(base)
    words = ["--model", base, "--train-file", str(texts_folder / "rows.csv"), "--output-dir", str(tmp_path / "out")]
    parsed = parse_arguments(
        [*words, f"--load-in-{bits}bit", "--use-cpu", "--lora-modules-to-save", "classifier", "pooler"]
    )
    trainer = build_trainer(parsed, read_data(parsed))
    model = trainer.model
    packed = [
        name
        for name, p in model.named_parameters()
        if name.endswith("query.weight") and p.dtype.itemsize * p.numel() != 64 * 64 * 4
    ]
    assert len(packed) == 2
    whole = [name for name, p in model.named_parameters() if "classifier" in name or "pooler" in name]
    assert whole
    assert all(model.get_parameter(name).dtype == torch.float32 for name in whole)
    trainer.train()
    trainer.save_model()
    assert LoraModel.from_pretrained(tmp_path / "out").config.num_labels == 2


def test_what_cannot_be_quantized_is_one_message(
    bases: dict[str, str], texts_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--model", bases["bert"], "--train-file", texts_folder / "rows.csv", "--output-dir", tmp_path / "out")
    both = run_command("train", *words, "--load-in-4bit", "--load-in-8bit", code=2).stderr
    assert "--load-in-4bit and --load-in-8bit contradict each other" in both
    config = json.loads(Path(bases["bert"], "config.json").read_text())
    (tmp_path / "base").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_bytes(Path(bases["bert"], name).read_bytes())
    quantized = {**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(quantized))
    again = run_command("train", "--model", tmp_path / "base", *words[2:], "--load-in-4bit", code=2).stderr
    assert f"{tmp_path / 'base'} is quantized already: omit --load-in-4bit." in again
    own = importlib.util.find_spec
    missing = lambda name, *_: None if name == "bitsandbytes" else own(name)  # noqa: E731
    monkeypatch.setattr("hf_lora.layers.storages.loading.find_spec", missing)
    error = run_command("train", *words, "--load-in-4bit", code=2).stderr
    assert '--load-in-4bit: it needs bitsandbytes, which is not installed. Run: pip install "hf_lora[quant]"' in error
    assert not (tmp_path / "out").exists()


def test_a_model_without_linear_layers(bases: dict[str, str]) -> None:
    config, cpu = AutoConfig.from_pretrained(bases["bert"]), torch.device("cpu")
    run, plain = parse_arguments(["--load-in-4bit"]).run, torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(ConfigError, match="--load-in-4bit: Sequential has no linear layer that can be quantized"):
        load_quantized(lambda _: plain, run, config, cpu, lambda _: [])


@pytest.mark.slow
def test_the_forecast_counts_few_bits(bases: dict[str, str], texts_folder: Path, tmp_path: Path) -> None:
    words = ("--model", bases["llama"], "--train-file", texts_folder / "pairs.jsonl", "--output-dir", tmp_path / "out")
    weights = []
    for more in ([], ["--load-in-8bit"], ["--load-in-4bit"]):
        said = run_command("train", *words, *more, "--dry-run", "--use-cpu").stdout
        found = re.search(r"\(weights ([\d.]+) (kB|MB)", said)
        assert found is not None
        weights.append(float(found[1]) * {"kB": 1e3, "MB": 1e6}[found[2]])
    real = AutoModelForCausalLM.from_pretrained(
        bases["llama"], quantization_config=method(4), dtype=torch.float32, device_map="cpu"
    )
    assert weights[0] > weights[1] > weights[2]
    dense, packed = (
        sum(p.numel() * p.element_size() for p in real.parameters() if (p.dtype == torch.uint8) is is_packed)
        for is_packed in (False, True)
    )
    adapters = weights[0] - 4 * AutoModelForCausalLM.from_pretrained(bases["llama"]).num_parameters()
    assert weights[2] == pytest.approx(dense + packed * 4.127 / 4 + adapters, rel=0.01)

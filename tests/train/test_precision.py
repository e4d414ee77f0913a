"""What is computed in which precision: the line that says it, curves beside float32's, masters that stay float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import Rows, sentences, texts, tiny_bert, tiny_llama

from hf_lora import LoraConfig, LoraTrainer
from hf_lora.errors import AdapterFileError

Make = Callable[..., Any]
STEPS = 12


def quantized_llama(tmp_path: Any, **options: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path / "base"
    if not folder.exists():
        tiny_llama().save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4"} | options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


# The line.


def precision_line(told: list[str]) -> str:
    return next(line for text in reversed(told) for line in text.splitlines() if line.startswith("precision: "))


@pytest.mark.parametrize(
    ("dtype", "flags", "said"),
    [
        (
            torch.float32,
            {},
            "base float32; adapters float32; products in the base's dtype; optimizer adamw_torch_fused",
        ),
        (torch.float32, {"bf16": True}, "base float32; adapters float32; products bfloat16 by autocast"),
        (torch.float32, {"fp16": True}, "products float16 by autocast, without loss scaling"),
        (torch.bfloat16, {}, "base bfloat16; adapters float32; products in the base's dtype"),
        (torch.bfloat16, {"bf16": True, "optim": "sgd"}, "products bfloat16 by autocast; optimizer sgd on float32"),
    ],
)
def test_the_start_says_the_precision(
    arguments: Make, told: list[str], dtype: torch.dtype, flags: dict[str, Any], said: str
) -> None:
    trainer = LoraTrainer(tiny_bert().to(dtype), arguments(max_steps=1, **flags), train_dataset=sentences(4))
    trainer.train()
    line = precision_line(told)
    assert said in line
    states = [v for s in trainer.optimizer.state.values() for v in s.values() if v.dim()]  # type: ignore[union-attr]
    assert all(v.dtype == torch.float32 for v in states)  # and what it says of the optimizer is so
    trainer.train()
    assert "AcceleratedOptimizer" not in precision_line(told[1:])


def test_the_start_says_how_the_base_is_quantized(arguments: Make, told: list[str], tmp_path: Any) -> None:
    model = quantized_llama(tmp_path, bnb_4bit_compute_dtype=torch.bfloat16)
    LoraTrainer(model, arguments(max_steps=1), train_dataset=texts(4)).train()
    line = precision_line(told)
    assert "base bitsandbytes NF4, float32;" in line
    assert "products in the base's dtype, those of 4-bit layers in bfloat16;" in line
    assert "adapters float32" in line


def test_a_run_does_not_go_on_over_another_form_of_the_base(arguments: Make, tmp_path: Any) -> None:
    def trainer(steps: int, **options: Any) -> Any:
        args = arguments(max_steps=steps, save_strategy="steps", save_steps=1)
        return LoraTrainer(quantized_llama(tmp_path, **options), args, train_dataset=texts(4))

    trainer(1).train()
    fp4 = trainer(2, bnb_4bit_quant_type="fp4")
    with pytest.raises(AdapterFileError, match=r"then bitsandbytes NF4, now bitsandbytes FP4"):
        fp4.train(resume_from_checkpoint=True)
    resumed = trainer(2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


# The curves.


def losses(model: Any, args: Any, rows: Rows) -> list[float]:
    trainer = LoraTrainer(model, args, train_dataset=rows, lora_config=LoraConfig(r=4))
    trainer.train()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return _curve(tmp_path_factory.mktemp("float32"), torch.float32, {})


def _curve(folder: Any, dtype: torch.dtype, flags: dict[str, Any]) -> list[float]:
    from hf_lora import LoraTrainingArguments

    args = LoraTrainingArguments(
        str(folder), max_steps=STEPS, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", per_device_train_batch_size=8, learning_rate=3e-2, seed=3, **flags,
    )  # fmt: skip
    return losses(tiny_bert(seed=3).to(dtype), args, sentences(32))


@pytest.mark.parametrize(
    ("dtype", "flags"), [(torch.float32, {"bf16": True}), (torch.bfloat16, {}), (torch.bfloat16, {"bf16": True})]
)
def test_bfloat16_learns_what_float32_learns(
    tmp_path: Any, in_float32: list[float], dtype: torch.dtype, flags: dict[str, Any]
) -> None:
    curve = _curve(tmp_path, dtype, flags)
    assert in_float32[-1] < in_float32[0] / 2  # there was something to learn
    # A loss is a mean of logarithms of probabilities: the logits' rounding of 2^-8, relative to logits of order 1,
    # times the layers that it passes (2 blocks of 6 products and a head), at every step anew.
    bound = 13 * torch.finfo(torch.bfloat16).eps
    assert max(abs(a - b) for a, b in zip(curve, in_float32, strict=True)) < bound
    assert curve != in_float32

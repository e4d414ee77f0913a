"""What several test files share: tiny models, random adapters, and comparisons with stated tolerances."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 64
PACKAGE = str(Path(__file__).parents[1] / "hf_lora")
CHECKS = (
    "file_maps",
    "targets",
    "select",
    "match",
    "patterns",
    "bypass",
    "errors",
    "config",
    "identity",
    "format",
    "headers",
)
"""Modules that only read the model: nothing can be half done there."""


def randomize(model: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Random values for all factors, trained biases and copies of every adapter, so that no test looks at B = 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            ours = any(p.startswith("lora_") for p in parts) or "copies" in parts
            if ours and not parameter.is_meta:
                noise = torch.randn(parameter.shape, generator=generator) * scale
                keep = parameter if "copies" in parts or "lora_bias" in parts or "magnitude" in name else 0.0
                parameter.copy_(keep + noise.to(parameter.device) * (0.3 if "magnitude" in name else 1.0))
    return model


def drop_modules(folder: Path, *names: str) -> Path:
    """Take modules that were trained whole out of an adapter's file, as earlier versions wrote it without them."""
    from safetensors.torch import load_file, save_file

    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file({k: v for k, v in load_file(weights).items() if not any(f".{n}." in k for n in names)}, weights)
    values = json.loads(config.read_text())
    kept = [name for name in values["modules_to_save"] if name.rpartition(".")[2] not in names]
    config.write_text(json.dumps(values | {"modules_to_save": kept or None}))
    return folder


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer by name."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {n: t.detach().clone() for n, t in tensors.items()}


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [n for n, t in expected.items() if not torch.equal(found[n], t)]
    assert not different, f"{len(different)} tensors differ, such as {different[:3]}"


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 4.0) -> None:
    """Equal but for `factor` roundings in `dtype`, in the norm."""
    error = relative_error(found, expected)
    assert error <= factor * torch.finfo(dtype).eps, f"relative error {error:.2e} in {dtype}"


def tiny_llama(seed: int = 0, tied: bool = False, layers: int = 2, **config: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**values | config)).eval()


def tiny_bert(labels: int = 3, seed: int = 0, cls: str = "BertForSequenceClassification", **config: Any) -> Any:
    import transformers

    torch.manual_seed(seed)
    values = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, num_labels=labels, initializer_range=0.2,
    )  # fmt: skip
    return getattr(transformers, cls)(transformers.BertConfig(**values | config)).eval()


def tiny_gpt2(seed: int = 0, **config: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    values = dict(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**values | config)).eval()


def tiny_t5(seed: int = 0, **config: Any) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    values = dict(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(T5Config(**values | config)).eval()


def tiny_resnet(labels: int = 3, seed: int = 0) -> Any:
    """An image classifier with BatchNorm."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=labels
    )
    return ResNetForImageClassification(config).eval()


def token_ids(rows: int = 2, length: int = 9, seed: int = 5) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch_for(model: Any, labels: bool = True) -> dict[str, Tensor]:
    """Keyword arguments of a forward of one of the tiny text models."""
    ids = token_ids()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if labels:
        classifies = "SequenceClassification" in type(model).__name__
        batch["labels"] = torch.arange(len(ids)) % model.num_labels if classifies else ids.clone()
    return batch


def adapter_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradient of every tensor that requires one."""
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def backward(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """One forward and backward; the gradients by name."""
    model.zero_grad()
    model(**batch).loss.backward()
    return adapter_gradients(model)


def offline() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run_command(*words: Any, code: int = 0) -> Any:
    """What `hf-lora` with these words printed; other errors than its own come through."""
    from typer.testing import CliRunner

    from hf_lora.cli.main import app

    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def write_lines(file: Path, rows: list[Any]) -> Path:
    """A JSONL file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def ending_at(moment: int, do: Callable[[], object]) -> None:
    """Do something, and end the process at a moment that is counted over moves, syncs and deletions."""
    passed = [0]

    def counted(own: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if passed[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            passed[0] += 1
            return own(*args, **kwargs)

        return call

    for name in ("replace", "rename", "fsync", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    do()
    os._exit(0)


class Cut(KeyboardInterrupt):
    pass


class Moments:
    """Counts the lines of the package that run, and raises at one of them."""

    def __init__(self, at: int | None = None, error: type[BaseException] = Cut) -> None:
        self.at, self.error, self.count = at, error, 0

    def __enter__(self) -> Moments:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame: FrameType, event: str, argument: object) -> Any:
        path = frame.f_code.co_filename
        if not path.startswith(PACKAGE) or Path(path).stem in CHECKS:
            return None
        return self._line

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            self.count += 1
            if self.at is not None and self.count > self.at:
                raise self.error(f"at {frame.f_code.co_filename}:{frame.f_lineno}")
        return self._line


def folded(layer: Any, names: tuple[str, ...]) -> Iterator[tuple[slice, Tensor]]:
    """(rows, block) of the weight of one site with the adapters `names` folded into it."""
    from hf_lora.adapt.dequantize import read_rows

    fold = layer.folding(names)
    for rows, block in read_rows(layer._lora.storage, layer):
        yield rows, fold(block, rows)


def needs_peft(version: str, reason: str) -> Any:
    """A mark that skips a test with an older PEFT."""
    import pytest

    from hf_lora.versions import is_older

    return pytest.mark.skipif(is_older("peft", version), reason=f"PEFT before {version} {reason}")


def why_no_images(folder: Path) -> str | None:
    """Why transformers cannot load the image processor in a folder: a package that this version needs is missing."""
    import transformers

    try:
        transformers.AutoImageProcessor.from_pretrained(folder)
    except ImportError as error:
        return f"transformers {transformers.__version__}: {str(error).strip().splitlines()[0]}"
    return None

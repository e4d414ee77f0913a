"""Memory that autograd saves for adapters, and the operations that they add: exact counts, independent of the machine.

    python examples/benchmarks/memory.py --dtype bfloat16 --dropout 0.05

The model is the body of a Llama of two layers with the proportions of Llama-3-8B: MLP 3.5 H, keys and values H / 4.
Bytes are those that grow with the tokens, per layer, in units of one activation (tokens x H in the base's dtype). What
does not depend on the batch, such as a factor in another dtype, is listed separately. The operations of a layer are
those that a second layer adds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import variants
from common import DTYPES, Operations, Table, arguments, count_operations, device_of, saved_bytes, settings_of
from torch import Tensor, nn
from variants import VARIANTS, Batch, Case, Lora, build, embedded, runnable

COUNTED = ("frozen", "peft", "peft_same", "ours")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="dtype of the base")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--hidden", type=int, help="H; default: 512, with --preset h200 4096")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of the shorter of the two compared rows")
    parser.add_argument("--rank", type=int, default=16)
    return parser.parse_args(words)


def body(hidden: int, layers: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Case:
    """A Llama with the proportions of the 8B model, without its head, and one row of tokens."""
    case = variants.llama(
        dtype, device, rows=1, tokens=tokens, vocab_size=256, hidden_size=hidden, intermediate_size=7 * hidden // 2,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip
    return Case(lambda: case.load().model, {k: v for k, v in case.batch.items() if k != "labels"}, head="")


def output_of(model: Any, batch: Batch) -> Callable[[], Tensor]:
    """A forward that returns one number; its backward always runs down to the embedded tokens."""
    inputs = embedded(model, batch)
    return lambda: model(**inputs).last_hidden_state.sum()


def kept_bytes(model: Any, batch: Batch) -> int:
    """Bytes saved for the backward of a step, without weights."""
    return saved_bytes(output_of(model, batch), (*model.parameters(), *model.buffers()))


def layer_figures(
    variant: str, lora: Lora, hidden: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float, int, int]:
    """For one layer: saved activations, bytes independent of the batch, operations forward and backward."""
    short, long = (body(hidden, 2, length, dtype, device) for length in (tokens, 2 * tokens))
    two = build(variant, short, lora)
    kept = [kept_bytes(two, case.batch) / 2 for case in (short, long)]
    one = build(variant, body(hidden, 1, tokens, dtype, device), lora)
    counted = [count_operations(output_of(model, short.batch)) for model in (two, one)]
    forward, backward = (len(a) - len(b) for a, b in zip(*counted, strict=True))
    return (kept[1] - kept[0]) / (tokens * hidden * dtype.itemsize), 2 * kept[0] - kept[1], forward, backward


class OneLinear(nn.Module):
    """A linear layer as a model to adapt."""

    def __init__(self, features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def linear_operations(
    variant: str, lora: Lora, features: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[str], list[str]]:
    """Operations of a single linear layer whose input (1, 8, I) requires a gradient, forward and backward."""
    x = torch.ones(1, 8, features, dtype=dtype, device=device, requires_grad=True)
    model = build(variant, Case(lambda: OneLinear(features, dtype, device), {"x": x}, head=""), lora)
    grad = torch.ones_like(x)
    with Operations() as there:
        y = model(x=x)
    with Operations() as back:
        y.backward(grad)
    return there.names, back.names


def measure(options: argparse.Namespace) -> Table:
    device = device_of(options)
    dtype = DTYPES[options.dtype]
    hidden = options.hidden or (4096 if options.preset == "h200" else 512)
    lora = Lora(options.rank, 2 * options.rank, options.dropout)
    rows: list[dict[str, Any]] = []
    for variant in runnable(COUNTED):
        kept, fixed, forward, backward = layer_figures(variant, lora, hidden, options.tokens, dtype, device)
        there, back = linear_operations(variant, lora, 64, dtype, device)
        rows.append(
            {
                "variant": VARIANTS[variant],
                "name": variant,
                "units": kept,
                "kept": f"{kept:.2f}",
                "ratio": f"{kept / (rows[0]['units'] if rows else kept):.3f}",
                "fixed": f"{fixed / 1024:.0f}",
                "layer": f"{forward} / {backward}",
                "linear": f"{len(there)} / {len(back)}",
            }
        )
    return Table(
        "memory",
        f"Kept activations and operations of a layer, {options.dtype}, hidden {hidden}, rank {options.rank}, "
        f"dropout {options.dropout:g}",
        {
            "variant": "variant",
            "kept": "kept activations",
            "ratio": "over frozen base",
            "fixed": "and KiB at any batch",
            "layer": "operations of a layer",
            "linear": "of a linear",
        },
        rows,
        settings_of(options),
        ["Operations are forward / backward; views and the getting of memory are not counted."],
    )


if __name__ == "__main__":
    asked = parse()
    measure(asked).show(asked.json)

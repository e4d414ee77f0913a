"""Greedy decoding with an adapter, unmerged and merged, relative to the base.

    python examples/benchmarks/decode.py --preset cpu --tokens 128

The adapters are random (B is not zero), the prompts are random tokens. All models alternate in one process. If
texts differ from those of unmerged hf_lora, the cause is rounding of a tie; the table shows how many tokens agree.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import variants
from common import DTYPES, Table, Times, arguments, device_of, settings_of, take_turns
from torch import Tensor
from variants import Case, Lora, build, runnable

NAMES = {
    "base": "base",
    "merged": "hf_lora, merged",
    "ours": "hf_lora, unmerged",
    "peft": "PEFT, unmerged",
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", choices=("llama", "smollm2"), help="default: smollm2, with --preset h200 llama")
    parser.add_argument("--base", help="folder of SmolLM2,; default: created from its package")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded in each call")
    parser.add_argument("--prompt", type=int, default=32, help="tokens per prompt")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts per call")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(words)


def decoders(case: Case, lora: Lora) -> dict[str, Any]:
    """The base, hf_lora merged and unmerged, and PEFT, ready to generate."""
    unmerged = build("ours", case, lora).eval()
    merged = copy.deepcopy(unmerged).merge_and_unload()
    found = {"base": case.load(), "merged": merged, "ours": unmerged}
    found |= {name: build(name, case, lora) for name in runnable(["peft"])}
    for model in found.values():
        model.eval().generation_config.eos_token_id = None  # no call stops early
    return found


def decode(model: Any, prompts: Tensor, tokens: int) -> Tensor:
    """Token ids (B, tokens) after prompts (B, T)."""
    with torch.no_grad():
        ids: Tensor = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    return ids[:, prompts.shape[1] :]


def measure(options: argparse.Namespace, case: Case | None = None) -> Table:
    device = device_of(options)
    large = options.preset == "h200"
    options.model = options.model or ("llama" if large else "smollm2")
    options.dtype = options.dtype or ("bfloat16" if large else "float32")
    dtype = DTYPES[options.dtype]
    if case is None and options.model == "smollm2":
        case = variants.smollm2(dtype, device, base=options.base)
    case = case or (variants.llama_8b(dtype, device) if large else variants.llama(dtype, device))
    found = decoders(case, Lora(options.rank, 2 * options.rank))
    times: dict[int, dict[str, Times]] = {}
    texts: dict[str, Tensor] = {}

    def call(name: str, prompts: Tensor) -> Callable[[], None]:
        def run() -> None:
            texts[name] = decode(found[name], prompts, options.tokens)

        return run

    generator = torch.Generator().manual_seed(0)
    agree = dict.fromkeys(found, 1.0)
    for size in options.batch:
        prompts = torch.randint(case.vocabulary, (size, options.prompt), generator=generator).to(device)
        times[size] = take_turns({name: call(name, prompts) for name in found}, options.rounds, warmup=1)
        agree = {n: min(share, float((texts[n] == texts["ours"]).double().mean())) for n, share in agree.items()}
    rows = [
        {"variant": NAMES[name], "name": name}
        | {f"batch {size}": times[size][name].over(times[size]["base"]) for size in options.batch}
        | {f"ms {size}": times[size][name].median * 1e3 / options.tokens for size in options.batch}
        | {"agree": None if name == "base" else f"{agree[name]:.0%}"}
        for name in found
    ]
    return Table(
        "decode",
        f"Decoding {options.tokens} tokens with {options.model}, {options.dtype}, rank {options.rank}",
        {"variant": "variant"}
        | {f"batch {size}": f"over the base, batch of {size}" for size in options.batch}
        | {f"ms {size}": f"ms a token, {size}" for size in options.batch}
        | {"agree": "the same tokens"},
        rows,
        settings_of(options),
    )


if __name__ == "__main__":
    asked = parse()
    measure(asked).show(asked.json)

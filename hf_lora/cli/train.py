"""`hf-lora train`: the model and data options are declared here; all others go to `train.parsing`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .options import OTHER_ARGUMENTS, path
from .threads import threads_for_free_cores

if TYPE_CHECKING:
    from ..train.parsing import Parsed
    from ..train.run import RunResult

EPILOG = """\
Every field of LoraTrainingArguments, and so of transformers' TrainingArguments, is an option as well:
--num-train-epochs 5, --learning-rate 1e-3, --lora-r 16, --lora-target-modules query value, --bf16 …
`hf-lora train --all-options` lists them. A YAML file (--config) can set any option as `name: value`; the command line
overrides it.

Example: hf-lora train --model MODEL --train-file train.csv --test-file test.csv --lora-r 16 --output-dir my-adapter
"""


_NOT_SHOWN = ("runtime", "per_second", "preparation_time", "epoch")
_OF_THE_COMMAND = ("config", "show_batch", "dry_run", "print_config", "all_options")
"""Options of the command itself, which are not arguments of a run."""


def register(app: typer.Typer) -> None:
    """Add this file's command to `app`."""
    app.command(epilog=EPILOG, context_settings=OTHER_ARGUMENTS)(train)


def train(
    ctx: typer.Context,
    config: Path | None = typer.Option(None, parser=path, metavar="PATH", help="YAML file of options."),
    model: str | None = typer.Option(None, help="Base model: folder or Hub name."),
    task: str | None = typer.Option(
        None,
        help="text-classification, multi-label-classification, token-classification, question-answering, "
        "image-classification, masked-lm, seq2seq-lm, causal-lm, dpo, kto, reward or embedding; default: from the "
        "columns.",
    ),
    load_in_4bit: bool = typer.Option(False, "--load-in-4bit", help="Quantize the base to 4 bits (NF4)."),
    load_in_8bit: bool = typer.Option(False, "--load-in-8bit", help="Quantize the base to 8 bits."),
    train_file: str | None = typer.Option(
        None, help="CSV, TSV, JSON, JSONL or parquet file to train on, or a folder of images."
    ),
    eval_file: str | None = typer.Option(None, help="File for evaluations, after each epoch."),
    test_file: str | None = typer.Option(None, help="File for the final evaluation."),
    dataset: str | None = typer.Option(None, help="Name for datasets.load_dataset, instead of files."),
    train_split: str | None = typer.Option(None, help="Dataset split to train on; default: train."),
    eval_split: str | None = typer.Option(None, help="Split for evaluations, after each epoch."),
    test_split: str | None = typer.Option(None, help="Split for the final evaluation."),
    text_column: str | None = typer.Option(
        None, help="Column of texts, prompts, questions, words or images; default: found by name."
    ),
    label_column: str | None = typer.Option(None, help="Column of labels, tags or spans; default: found by name."),
    completion_column: str | None = typer.Option(None, help="Column of answers, which are trained."),
    max_length: int | None = typer.Option(None, help="Maximum tokens per text and packed row; default: 512 or 1024."),
    problem_type: str | None = typer.Option(
        None,
        help="regression if the labels are numbers; single_label_classification if any label is a class; "
        "multi_label_classification.",
    ),
    output_dir: str | None = typer.Option(None, help="Folder for the adapter; default: hf_lora_run."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the adapter of an earlier run in that folder."),
    verbose: bool = typer.Option(False, "--verbose", help="Also list every adapted layer before training."),
    show_batch: bool = typer.Option(
        False, "--show-batch", help="Show three rows, with marks around what is trained, and exit."
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Show what would be trained, and a forecast of memory and disk, and exit."
    ),
    print_config: bool = typer.Option(
        False, "--print-config", help="Print the options as YAML, for --config, and exit."
    ),
    all_options: bool = typer.Option(False, "--all-options", help="List every option and exit."),
) -> None:
    """Fine-tune a model on files.

    The columns show the task: classification of texts, words or images, question answering, texts for texts by an
    encoder-decoder, or causal language modeling on chats, prompt-answer pairs or plain texts; --task names it. The
    adapter and the tokenizer are saved.
    """
    with threads_for_free_cores():
        from accelerate import PartialState

        from ..train.parsing import describe_arguments, parse_arguments
        from ..train.run import first_batch
        from ..train.template import as_yaml

    if all_options:
        typer.echo(describe_arguments())
        raise typer.Exit
    shown = {"--print-config": print_config, "--dry-run": dry_run, "--show-batch": show_batch}
    if sum(shown.values()) > 1:
        raise typer.BadParameter(f"pass only one of {', '.join(name for name, given in shown.items() if given)}.")
    own = {name: value for name, value in ctx.params.items() if name not in _OF_THE_COMMAND}
    declared = [f"--{name}={value}" for name, value in own.items() if value is not None and value is not False]
    parsed = parse_arguments([*declared, *ctx.args], config)
    if print_config:
        typer.echo(as_yaml(parsed), nl=False)
        raise typer.Exit
    if dry_run:
        from ..train.forecast import forecast

        typer.echo(str(forecast(parsed)))
        raise typer.Exit
    if show_batch:
        typer.echo(first_batch(parsed))
        raise typer.Exit
    result = _run(parsed)
    processes = PartialState()
    processes.destroy_process_group()  # a process that ends while threads of gloo are alive may be aborted
    if processes.is_main_process:
        typer.echo(_summary(result))


def _run(parsed: Parsed) -> RunResult:
    from ..train.checkpoint.manifest import checkpoints, why_incomplete
    from ..train.run import finetune
    from ..train.search import FILE

    try:
        return finetune(parsed, report=typer.echo)
    except KeyboardInterrupt as end:
        folder = str(parsed.training.output_dir)
        saved = next((path for path in checkpoints(folder) if not why_incomplete(path)), None)
        if saved is None and parsed.run.search_learning_rate and Path(folder, FILE).is_file():
            text = f"Interrupted. The trials of learning rates are in {Path(folder, FILE)}; the same command goes on."
        elif saved is None:
            text = "Interrupted before the first checkpoint: nothing was saved. --save-steps sets how often one is."
        else:
            text = f"Interrupted. {saved} is saved. Continue with:\n{_continued(sys.argv)}"
        typer.echo(text, err=True)
        raise typer.Exit(130) from end


def _continued(argv: list[str]) -> str:
    """The command line of this process, changed to resume."""
    words = [word for word in argv[1:] if word != "--overwrite"]
    resumes = any(word.replace("_", "-").startswith("--resume-from-checkpoint") for word in words)
    return shlex.join(["hf-lora", *words, *([] if resumes else ["--resume-from-checkpoint", "True"])])


def _summary(result: RunResult) -> str:
    lines = [result.loss] if result.loss else []
    lines += _table(result.metrics)
    lines += [f"pushed: {result.pushed}"] if result.pushed else []
    lines.append(f"trained in {result.seconds:,.0f} s; adapter of {result.adapter_bytes / 1e6:,.2f} MB")
    task = result.task
    if task is None or task.commands:
        use = "chat {}" if _chats(result.model) else "eval {} --file FILE"
        lines.append(f"Use it with: hf-lora {use.format(shlex.quote(str(result.output_dir)))}")
    else:
        lines.append(f'Load it with: {task.loader}("{result.output_dir}")')
    return "\n".join(lines)


def _table(metrics: dict[str, float]) -> list[str]:
    """The metrics, with a column for each split; without metrics, no lines."""
    kept = {name: v for name, v in metrics.items() if not name.endswith(_NOT_SHOWN)}
    splits = list(dict.fromkeys(name.partition("_")[0] for name in kept))
    names = list(dict.fromkeys(name.partition("_")[2] for name in kept))
    width = max(map(len, names), default=0)
    lines = [" " * width + "".join(f"{split:>10}" for split in splits)] if names else []
    for name in names:
        cells = (kept.get(f"{split}_{name}") for split in splits)
        lines.append(f"{name:<{width}}" + "".join(f"{'' if v is None else f'{v:,.4g}':>10}" for v in cells))
    return lines


def _chats(model: Any) -> bool:
    return bool(model.can_generate() and not model.config.is_encoder_decoder)

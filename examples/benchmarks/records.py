"""Write docs/records.md, the results on test sets, from records.json, to which the studies append their runs.

python examples/benchmarks/records.py
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for studies.py
import studies

PAGE = Path(__file__).parents[2] / "docs" / "records.md"
HEAD = """# Records

Results on test sets, the best first: the mean over the seeds and, with more than one, the standard deviation. Times
are those of the training, on one or two cores of a shared machine, so only large differences mean something; memory is
the peak of the process. A dash: not recorded. Settings were chosen on held-out training rows unless a page says
otherwise.

`examples/benchmarks/records.py` writes this page from `records.json` beside it, to which the studies append their
runs. [Banking77](banking77.md), [GSM8K](gsm8k.md) and [Methods](methods.md) describe them.
"""
METHODS = {
    "full": "full fine-tuning",
    "full_cls": "full fine-tuning, first token",
    "full_mean": "full fine-tuning, mean",
    "peft_cls": "PEFT, first token",
    "peft_mean": "PEFT, mean",
    "hf_lora": "hf_lora",
    "train": "hf-lora train",
}
"""How the page names the methods of the studies."""
NO_BREAK = "\u2011"
"""A hyphen at which no line ends."""
HIGHER = {"accuracy", "exact match", "field F1"}
"""Metrics of which higher values are better; they are shown in percent."""


def page(runs: list[dict[str, Any]]) -> str:
    """The page for some runs."""
    groups: dict[tuple[str, str], dict[tuple[str, ...], list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["split"] == studies.TEST and run["value"] is not None:
            groups[run["data"], run["metric"]][run["model"], run["method"], run["settings"]].append(run)
    return "\n".join([HEAD, *(line for key, found in sorted(groups.items()) for line in section(*key, found))])


def section(data: str, metric: str, found: dict[tuple[str, ...], list[dict[str, Any]]]) -> list[str]:
    """The table of a data set, with the commands below it."""
    factor, sign = (100, -1) if metric in HIGHER else (1, 1)
    unit = f"{metric}, %" if metric in HIGHER else metric
    ordered = sorted(found.items(), key=lambda item: (sign * mean(item[1]), item[0]))
    commands = list(dict.fromkeys(run["command"] for _, group in ordered for run in group if run["command"]))
    lines = [
        f"## {data}: {metric}",
        "",
        f"| model | method | {unit} | seeds | seconds | peak memory, MB | date | command |",
    ]
    lines.append("|---|---|--:|--:|--:|--:|---|--:|")
    for (model, method, settings), group in ordered:
        values = [factor * run["value"] for run in group]
        result = studies.spread(values, 2 if factor == 100 else 3) if len(values) > 1 else f"{values[0]:.4g}"
        named = METHODS.get(method, method)
        cells = [
            model, f"{named}: {settings}" if settings else named, result, len(group),
            studies.spread(seconds, 0) if (seconds := given(group, "seconds")) else "–",
            f"{max(peaks):,}" if (peaks := given(group, "megabytes")) else "–",
            max(run["date"] for run in group).replace("-", NO_BREAK),
            ", ".join(sorted({str(commands.index(run["command"]) + 1) for run in group if run["command"]})) or "–",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", *(f"{number}. `{command}`" for number, command in enumerate(commands, 1)), ""]
    return lines


def mean(group: list[dict[str, Any]]) -> float:
    return sum(run["value"] for run in group) / len(group)


def given(group: list[dict[str, Any]], name: str) -> list[float]:
    """A figure of all runs; empty if one lacks it."""
    values = [run[name] for run in group]
    return [] if None in values else values


if __name__ == "__main__":
    PAGE.write_text(page(studies.Runs(studies.RECORDS).all), encoding="utf-8")

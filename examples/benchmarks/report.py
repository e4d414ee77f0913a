r"""Markdown tables and a plot from the JSON files of the benchmarks.

    python examples/benchmarks/report.py out/benchmarks/*.json                            # prints the tables
    python examples/benchmarks/report.py out/benchmarks/*.json \
        --into docs/performance.md --plot docs/images/performance.png

--into replaces the text after the command below a script's heading, such as `## train_step.py`, by its tables. All
runs of train_step.py make one table with a row for each run, and so do those of memory.py.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from common import Ratio, Table, describe, markdown, read_table

COLUMNS = {
    "peft": "PEFT, default",
    "peft_same": "PEFT, base's dtype",
    "peft_compiled": "PEFT, compiled",
    "full": "full fine-tuning",
    "ours": "hf_lora",
}
DRAWN = {"peft": "#b0413e", "full": "#9a9a9a", "ours": "#2f6690"}


def run_name(table: Table) -> str:
    """The label of a run of train_step.py."""
    s = table.settings
    dtype = "bf16 autocast" if s["autocast"] else {"float32": "fp32", "bfloat16": "bf16"}[s["dtype"]]
    parts = [s["model"], dtype, *([f"dropout {s['dropout']:g}"] if s["dropout"] else [])]
    return ", ".join([*parts, *(["loss over the head"] if s["loss"] == "head" else [])])


def ratios(table: Table) -> dict[str, Ratio]:
    """Variant -> its ratio to the frozen base."""
    return {row["name"]: row["frozen"] for row in table.rows if row["frozen"] is not None}


def summary(runs: list[Table]) -> str:
    """One row per run of train_step.py: every variant relative to the frozen base, and hf_lora relative to PEFT."""
    present = [c for c in COLUMNS if any(c in ratios(run) for run in runs)]
    rows = []
    for run in runs:
        found = ratios(run)
        ours = next((row["peft"] for row in run.rows if row["name"] == "ours"), None)
        cells = [f"{found[c].value:.2f}" if c in found else "–" for c in present]
        limit = f"{run.settings['limit']:.2f}"
        rows.append([run_name(run), limit, *cells, f"{ours.value:.2f}" if ours is not None else "–"])
    return markdown(["over the frozen base", "FLOP limit", *(COLUMNS[c] for c in present), "hf_lora over PEFT"], rows)


def stacked(runs: list[Table]) -> str:
    """The rows of all runs of memory.py, beginning with the base's dtype and the dropout."""
    rows = [
        [f"{run.settings['dtype']}, {run.settings['dropout']:g}", *(str(row[key]) for key in run.columns)]
        for run in runs
        for row in run.rows
    ]
    return markdown(["dtype, dropout", *runs[0].columns.values()], rows)


def sections(tables: list[Table]) -> dict[str, str]:
    """Script -> its tables in Markdown, each with its title and machine."""
    made: dict[str, str] = {}
    runs = [t for t in tables if t.kind == "train_step"]
    if runs:
        made["train_step"] = f"{summary(runs)}\n\n{', '.join(sorted({describe(t.machine) for t in runs}))}."
    counts = [t for t in tables if t.kind == "memory"]
    if counts:
        made["memory"] = stacked(counts)
    for table in tables:
        if table.kind not in ("train_step", "memory"):
            notes = "".join(f"{note}\n\n" for note in table.notes)
            text = f"{table.title}.\n\n{table.markdown()}\n\n{notes}{describe(table.machine)}."
            made[table.kind] = f"{made[table.kind]}\n\n{text}" if table.kind in made else text
    return made


def put_into(page: str, made: dict[str, str]) -> str:
    """The page with the text between each script's command and the next heading replaced."""
    for kind, text in made.items():
        pattern = rf"(^## {kind}\.py\n.*?^```bash\n.*?^```\n)(.*?)(?=^## |\Z)"
        page, count = re.subn(pattern, lambda m: f"{m[1]}\n{text}\n\n", page, flags=re.M | re.S)  # noqa: B023
        if not count:
            sys.exit(f"The page has no heading `## {kind}.py` with a command below it. Nothing was written.")
    return page.rstrip() + "\n"


def draw(runs: list[Table], file: Path) -> None:
    """Bars of each run's ratios to the frozen base, from 1, with the FLOP limit as a line."""
    from matplotlib.figure import Figure

    names = [name for name in DRAWN if any(name in ratios(run) for run in runs)]
    figure = Figure(figsize=(5.2, 1.1 + 0.78 * len(runs)), layout="constrained")  # legible on a narrow screen
    axes = figure.subplots()
    height = 0.66 / max(1, len(names))
    for i, name in enumerate(names):
        places = [row + 0.3 + (i + 0.5) * height for row in range(len(runs))]
        values = [ratios(run)[name].value if name in ratios(run) else 1.0 for run in runs]
        bars = axes.barh(places, [v - 1 for v in values], height * 0.9, 1, color=DRAWN[name], label=COLUMNS[name])
        axes.bar_label(bars, [f"{v:.2f}" if v != 1.0 else "" for v in values], padding=3, fontsize=8)
    for row, run in enumerate(runs):
        axes.text(1, row + 0.16, f" {run_name(run)}", va="center", fontsize=9, fontweight="bold")
        axes.plot([run.settings["limit"]] * 2, [row + 0.28, row + 0.98], color="black", lw=1.5,
                  label="FLOP limit" if row == 0 else None)  # fmt: skip
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks([])
    axes.set_ylim(len(runs), 0)
    axes.set_xlabel("time of a training step (frozen base = 1; shorter is better)")
    axes.margins(x=0.1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=200)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="files that the benchmarks wrote with --json")
    parser.add_argument("--into", type=Path, help="the page whose tables are replaced; default: print them")
    parser.add_argument("--plot", type=Path, help="file for the plot of the training steps")
    options = parser.parse_args(words)
    tables = [table for file in options.files if (table := read_table(file)) is not None]
    made = sections(tables)
    if options.into is None:
        print("\n\n".join(f"## {kind}.py\n\n{text}" for kind, text in made.items()))
    else:
        options.into.write_text(put_into(options.into.read_text(encoding="utf-8"), made), encoding="utf-8")
    if options.plot is not None:
        draw([t for t in tables if t.kind == "train_step"], options.plot)


if __name__ == "__main__":
    main()

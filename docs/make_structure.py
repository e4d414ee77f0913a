"""Draw the packages of hf_lora and what imports what, from the code: docs/images/structure.svg.

Run it as `.venv/bin/python docs/make_structure.py` after a change of imports; a test compares.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_lora"
PICTURE = ROOT / "docs" / "images" / "structure.svg"
LEFT_OUT = {"__init__", "testing"}
"""The root, which names everything, and what is for tests alone."""
WIDTH, HEIGHT, GAP, RISE = 250, 62, 22, 46
LINE = 40
"""Characters of a line of text in a box."""


def modules() -> dict[str, list[Path]]:
    """Name of a package or top-level module -> its files."""
    found: dict[str, list[Path]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).with_suffix("").parts[0]
        if name not in LEFT_OUT:
            found.setdefault(name, []).append(file)
    return found


def imported(file: Path) -> Iterator[str]:
    """The packages and top-level modules of ours that a file imports, those inside functions included."""
    package = [PACKAGE.name, *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        words = [*base, *(node.module or "").split(".")]
        names = [words[1]] if len(words) > 1 and words[1] else [alias.name for alias in node.names]
        yield from (name for name in names if words[0] == PACKAGE.name)


def graph() -> dict[str, set[str]]:
    """Name -> what it imports, without itself and without what follows from the others."""
    files = modules()
    whole = {name: {n for f in paths for n in imported(f)} & files.keys() - {name} for name, paths in files.items()}
    reached: dict[str, set[str]] = {}
    for name in graphlib.TopologicalSorter(whole).static_order():
        reached[name] = whole[name].union(*(reached[n] for n in whole[name]))
    return {name: {n for n in own if not any(n in reached[o] for o in own)} for name, own in whole.items()}


def purpose(name: str) -> str:
    """The first sentence of what a package or module says of itself."""
    file = PACKAGE / name / "__init__.py"
    text = (file if file.exists() else PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    words = " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split())
    return words.partition(". ")[0].rstrip(".").replace("`", "")


def rows(edges: dict[str, set[str]]) -> list[list[str]]:
    """Names by level, the highest first: each stands above all that it imports."""
    level: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(edges).static_order():
        level[name] = 1 + max((level[n] for n in edges[name]), default=-1)
    return [sorted(n for n, at in level.items() if at == k) for k in range(max(level.values()), -1, -1)]


def wrapped(text: str) -> list[str]:
    """At most two lines of `LINE` characters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > LINE:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines if len(lines) <= 2 else [lines[0], f"{lines[1].rstrip(',:;')} …"]


def draw() -> str:
    """The picture, as SVG."""
    edges = graph()
    levels = rows(edges)
    width = max(len(row) for row in levels) * (WIDTH + GAP) + GAP
    height = len(levels) * (HEIGHT + RISE) - RISE + 2 * GAP
    place = {}
    for k, row in enumerate(levels):
        start = (width - len(row) * (WIDTH + GAP) + GAP) / 2
        place |= {name: (start + i * (WIDTH + GAP), GAP + k * (HEIGHT + RISE)) for i, name in enumerate(row)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        "<title>The packages of hf_lora: each imports only what is below it</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for name in sorted(edges):
        x, y = place[name][0] + WIDTH / 2, place[name][1] + HEIGHT
        for other in sorted(edges[name]):
            u, v = place[other][0] + WIDTH / 2, place[other][1]
            bend = min(60.0, (v - y) / 2)
            parts.append(
                f'<path d="M{x:g},{y:g} C{x:g},{y + bend:g} {u:g},{v - bend:g} {u:g},{v:g}" '
                'fill="none" stroke="#7986cb" stroke-width="1.5"/>'
                f'<circle cx="{u:g}" cy="{v:g}" r="3" fill="#3f51b5"/>'
            )
    for name, (x, y) in place.items():
        shown = f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py"
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="#e8eaf6" stroke="#3f51b5"/>'
            f'<text x="{x + 9:g}" y="{y + 19:g}" font-size="15" font-weight="bold" fill="#1a237e">{shown}</text>'
        )
        for i, line in enumerate(wrapped(purpose(name))):
            parts.append(
                f'<text x="{x + 9:g}" y="{y + 37 + 15 * i:g}" font-size="12" fill="#222222">{escape(line)}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")

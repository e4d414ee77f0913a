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
LEFT_OUT = {"__init__", "testing", "errors", "compat", "config", "foreign_fields", "versions"}
"""The root, which names everything, what is for tests alone, and what every package may import."""
WIDTH, HEIGHT, GAP, RISE, LANE = 290, 62, 30, 34, 14
LINE = 44
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
    """Names by level, the highest first: each is above what it imports. Those imported from afar are on the right."""
    level: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(edges).static_order():
        level[name] = 1 + max((level[n] for n in edges[name]), default=-1)
    far = {other for name in edges for other in edges[name] if level[name] - level[other] > 1}
    top = max(level.values())
    return [sorted((n for n in level if level[n] == k), key=lambda n: (n in far, n)) for k in range(top, -1, -1)]


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
    level = {name: k for k, row in enumerate(levels) for name in row}
    far = [(name, other) for name in level for other in sorted(edges[name]) if level[other] - level[name] > 1]
    inner = max(len(row) for row in levels) * (WIDTH + GAP) + GAP
    width, height = inner + LANE * (len(far) + 1), len(levels) * (HEIGHT + RISE) - RISE + 2 * GAP
    place = {}
    for k, row in enumerate(levels):
        start = (inner - len(row) * (WIDTH + GAP) + GAP) / 2
        place |= {name: (start + i * (WIDTH + GAP), GAP + k * (HEIGHT + RISE)) for i, name in enumerate(row)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif">',
        "<title>The packages of hf_lora: each imports only what is below it</title>",
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
    ]
    for name in level:
        for other in sorted(edges[name]):
            if (name, other) not in far:
                parts += _arrow(_near(*place[name], *place[other]), place[other][0] + WIDTH / 2, place[other][1])
    for i, (name, other) in enumerate(reversed(far)):  # in a lane of its own on the right
        lane, (x, y), (u, v) = inner + i * LANE, place[name], place[other]
        start, end = y + HEIGHT / 2 + 7, v + HEIGHT / 2 - 7 - 5 * (i % 3)
        bends = f"M{x + WIDTH:g},{start:g} H{lane - 9:g} Q{lane:g},{start:g} {lane:g},{start + 9:g}"
        bends += f" V{end - 9:g} Q{lane:g},{end:g} {lane - 9:g},{end:g} H{u + WIDTH:g}"
        parts += _arrow(bends, u + WIDTH, end)
    for name, (x, y) in place.items():
        shown = f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py"
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="#e8eaf6" stroke="#3f51b5"/>'
            f'<text x="{x + 9:g}" y="{y + 20:g}" font-size="17" font-weight="bold" fill="#1a237e">{shown}</text>'
        )
        for i, line in enumerate(wrapped(purpose(name))):
            parts.append(
                f'<text x="{x + 9:g}" y="{y + 38 + 16 * i:g}" font-size="13" fill="#222222">{escape(line)}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


def _near(x: float, y: float, u: float, v: float) -> str:
    """From the bottom of one box to the top of one in the next row."""
    x, y, u = x + WIDTH / 2, y + HEIGHT, u + WIDTH / 2
    bend = (v - y) / 2
    return f"M{x:g},{y:g} C{x:g},{y + bend:g} {u:g},{v - bend:g} {u:g},{v:g}"


def _arrow(path: str, x: float, y: float) -> list[str]:
    """A line, and a dot where it ends."""
    return [
        f'<path d="{path}" fill="none" stroke="#7986cb" stroke-width="1.6"/>',
        f'<circle cx="{x:g}" cy="{y:g}" r="3.5" fill="#3f51b5"/>',
    ]


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")

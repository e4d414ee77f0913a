"""What pages of the documentation take from the code when they are built: a hook of mkdocs.

A comment such as `<!-- flags -->` in a page is replaced by what the function of that name returns.
"""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1] / "hf_lora"
SHORTEST = 12
"""Letters of the shortest message that is listed; others are little but what they quote."""
PARTS = {
    "config": "Configuration", "adapt": "Adding, switching and merging", "layers": "Layers and methods",
    "pooled": "Classifiers", "files": "Files of adapters", "safe_io": "Reading and writing files", "load": "Loading",
    "file_merge": "Merging from file to file", "export": "Writing merged models", "hub": "The Hub", "data": "Data",
    "tasks": "Tasks", "train": "Training", "evaluation": "Evaluation", "generate": "Generating", "model": "LoraModel",
    "pipelines": "Pipelines", "cli": "Command line", "versions": "Versions of other libraries",
}  # fmt: skip
"""Package or module -> its heading, in the order of the page."""


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the comments of a page; mkdocs calls it."""
    makers = {"flags": flags, "messages": messages}
    return re.sub(r"<!-- (\w+) -->", lambda found: makers[found[1]]() if found[1] in makers else found[0], markdown)


def on_page_content(content: str, **_: object) -> str:
    """Mark where code within a line may break: at a part of a long name, and never in a flag; mkdocs calls it."""
    return re.sub(r"<pre.*?</pre>|<code>[^<]*</code>", lambda found: breakable(found[0]), content, flags=re.S)


def breakable(code: str) -> str:
    """Inline code with its flags in spans and possible line breaks in long names; blocks as they are."""
    if code.startswith("<pre"):
        return code
    text = code.removeprefix("<code>").removesuffix("</code>")
    parts = re.split(r"((?<![\w-])--[\w-]+)", text)
    parts[::2] = [
        re.sub(r"[\w./(]{16,}", lambda name: re.sub(r"\B_|[./(]", r"<wbr>\g<0>", name[0]), part) for part in parts[::2]
    ]
    parts[1::2] = [f'<span class="flag">{flag}</span>' for flag in parts[1::2]]
    return f"<code>{''.join(parts)}</code>"


def trees(folder: Path = PACKAGE) -> Iterator[tuple[str, ast.Module]]:
    """(package or module, its parsed file) for each file."""
    for file in sorted(folder.rglob("*.py")):
        yield file.relative_to(folder).with_suffix("").parts[0], ast.parse(file.read_text(encoding="utf-8"))


# Flags ---------------------------------------------------------------------------------------------------------------


def flags() -> str:
    """The fields of `LoraArguments` with their defaults and help texts, as a table."""
    tree = ast.parse((PACKAGE / "train" / "arguments.py").read_text(encoding="utf-8"))
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and called(node.value) == "flag":
            default, text = node.value.args[:2]
            rows.append(
                f"| `{ast.unparse(node.target)}` | `{ast.unparse(default)}` | {cell(ast.literal_eval(text))} |"
            )
    return "\n".join(rows)


# Messages ------------------------------------------------------------------------------------------------------------


class Message(NamedTuple):
    """What one place of the code says: the error's name, what is wrong, and what to do."""

    kind: str
    wrong: str
    todo: str


def messages() -> str:
    """Every error that the code raises, with … for what is filled in, by part of the library."""
    found: dict[str, dict[str, Message]] = {part: {} for part in PARTS}
    for part, tree in trees():
        for message in raised(tree):
            if part in found and len(re.sub(r"\W", "", message.wrong)) >= SHORTEST:
                found[part].setdefault(message.wrong, message)
    return "\n\n".join(
        f"### {PARTS[part]}\n\n| error | what is wrong | what to do |\n|---|---|---|\n"
        + "\n".join(f"| `{m.kind}` | {cell(m.wrong)} | {cell(m.todo)} |" for m in sorted(rows.values()))
        for part, rows in found.items()
        if rows
    )


def raised(tree: ast.Module) -> Iterator[Message]:
    """The errors that a file raises, and the faults that it lists in one error."""
    everywhere = checks(tree)
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        ends = checks(function) or everywhere
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            name, texts = called(call), [text for text in map(literal, call.args) if text is not None]
            if name.endswith("Error") and name != "AttributeError" and texts:
                wrong, _, todo = re.sub(r"\. (?=[A-Z`])", "\0", texts[0], count=1).partition("\0")
                yield Message(name, wrong, todo)
            elif name == "add" and texts and "fault" in ast.unparse(call.func).lower():
                kinds, steps = {kind for kind, _ in ends}, {step for _, step in ends}
                yield Message(
                    kinds.pop() if len(kinds) == 1 else "LoraError",
                    texts[0],
                    " ".join(sorted(steps)[:1]) if len(steps) == 1 else "",
                )


def checks(tree: ast.AST) -> set[tuple[str, str]]:
    """(error, next step) of each `faults.check(SomeError, next_step)`."""
    return {
        (ast.unparse(call.args[0]), literal(call.args[1]) or "")
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and called(call) == "check" and len(call.args) == 2
        if ast.unparse(call.args[0]).endswith("Error")
    }


def called(call: ast.Call) -> str:
    """The last name of what is called."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def literal(node: ast.expr) -> str | None:
    """The text of an expression, with … for what is filled in; None if it has no text of its own."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = literal(node.left), literal(node.right)
        return None if sides == (None, None) else "".join(side or "…" for side in sides)
    return None


def cell(text: str) -> str:
    """A text in a cell of a table of Markdown, as it is, with code where it has backticks."""
    text = re.sub(r"…(?:…)+", "…", " ".join(text.split())).removeprefix("…: ")
    text = re.sub(r"([\\*_{}\[\]|#])", r"\\\1", html.escape(text, quote=False))
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text).replace("`", "\\`")

"""The public names, the ladder of imports, and what the sources must not hold."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_lora

ROOT = Path(hf_lora.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# The packages and modules from the bottom up; imports go down or stay. `__init__` and `testing` stand beside them.
LEVELS = {
    "config": 0, "foreign_fields": 0, "errors": 0, "versions": 0, "compat": 0, "safe_io": 1,
    "layers": 2, "data": 2, "adapt": 3, "loss": 3, "pooled": 3,
    "files": 4, "file_merge": 5, "hub": 6, "load": 7, "model": 7, "apply": 7, "pipelines": 8, "export": 8,
    "generate": 9, "evaluation": 10, "tasks": 11, "train": 12, "cli": 13,
}  # fmt: skip
BESIDE = {"", "__init__", "testing", "__main__"}


def room(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """(room, line) of each import of our own in a file, those inside functions included."""
    package = ["hf_lora", *file.relative_to(ROOT).parent.parts]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "hf_lora" else [module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "hf_lora":
                yield (parts[1] if len(parts) > 1 else ""), getattr(node, "lineno", 0)


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(file: Path) -> set[str]:
    """The modules of our own that a file imports, those inside functions included."""
    known = {module_name(f) for f in FILES}
    package = [*file.relative_to(ROOT.parent).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            whole = {f"{module}.{alias.name}" for alias in node.names}
            found |= whole & known or {module}
    return found & known


def test_no_modules_import_one_another() -> None:
    """The root names what it takes from where only to type checkers."""
    graph = {module_name(f): imported_modules(f) for f in FILES if module_name(f) != "hf_lora"}
    assert len(graph) > 100
    assert sum(len(edges) for edges in graph.values()) > 300
    graphlib.TopologicalSorter(graph).prepare()  # which raises CycleError with the circle


def test_all_names_resolve_and_nothing_else_is_public() -> None:
    assert sorted(set(hf_lora.__all__)) == sorted(hf_lora.__all__)
    for name in hf_lora.__all__:
        value = getattr(hf_lora, name)
        assert name == "__version__" or value.__doc__ or callable(value)
    assert dir(hf_lora) == sorted(hf_lora.__all__)
    assert not hasattr(hf_lora, "no_such_name")
    namespace: dict[str, object] = {}
    exec("from hf_lora import *", namespace)
    assert set(hf_lora.__all__) <= namespace.keys()


def test_type_checkers_see_the_names_that_are_there_at_run_time() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {f".{n.module}": {a.name for a in n.names} for n in block.body if isinstance(n, ast.ImportFrom)}
    where: dict[str, set[str]] = {}
    for name, module in hf_lora._WHERE.items():
        where.setdefault(f".{module}", set()).add(name)
    assert seen == where


def test_no_module_has_the_name_of_a_public_function() -> None:
    """Importing it would put it in the function's place."""
    modules = {f.stem if f.stem != "__init__" else f.parent.name for f in ROOT.glob("*.py")} | {
        f.parent.name for f in ROOT.glob("*/__init__.py")
    }
    assert not modules & set(hf_lora.__all__)
    assert {"finetune", "generate_texts", "merge_files"} <= set(hf_lora.__all__)


def test_public_errors_are_lora_errors() -> None:
    errors = [n for n in hf_lora.__all__ if n.endswith("Error")]
    assert len(errors) >= 8
    assert all(issubclass(getattr(hf_lora, n), hf_lora.LoraError) for n in errors)


def test_every_file_has_a_room() -> None:
    assert {room(f) for f in FILES} <= LEVELS.keys() | BESIDE


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_down_the_ladder(file: Path) -> None:
    here = room(file)
    if here in BESIDE:
        return
    wrong = [
        f"line {line}: {there}" for there, line in imports(file) if there in LEVELS and LEVELS[there] > LEVELS[here]
    ]
    assert not wrong, f"{here} (level {LEVELS[here]}) imports from above"


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    """No module of a third party at all."""
    before, after = loaded_after(""), loaded_after("import hf_lora, hf_lora.errors, hf_lora.config")
    ours = {m for m in after - before if not m.startswith("hf_lora")}
    assert {m.partition(".")[0] for m in ours} <= set(sys.stdlib_module_names) | {""}


@pytest.mark.parametrize("library", ["peft", "bitsandbytes", "torchao", "sklearn", "matplotlib"])
def test_optional_libraries_are_not_imported_at_module_level(library: str) -> None:
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(n.partition(".")[0] == library for n in names), f"{file.name} imports {library}"


ARCHITECTURES = {
    "albert", "bart", "bert", "bloom", "clip", "codegen", "convnext", "deberta", "deepseek", "detr", "distilbert",
    "electra", "falcon", "gemma", "gemma2", "gpt", "gpt2", "gptj", "hubert", "llama", "llava", "mamba", "mbart",
    "mistral", "mixtral", "opt", "phi", "phi3", "qwen", "qwen2", "qwen3", "resnet", "roberta", "segformer", "siglip",
    "starcoder", "swin", "t5", "vit", "wav2vec2", "whisper",
}  # fmt: skip


def words(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Identifiers and string constants that are no docstrings."""
    documentation = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value, line
        for attribute in ("id", "attr", "name", "arg"):
            value = getattr(node, attribute, None)
            if isinstance(value, str):
                yield value, line


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_file_names_a_model_architecture(file: Path) -> None:
    named = [
        f"line {line}: {text!r}"
        for text, line in words(ast.parse(file.read_text(encoding="utf-8")))
        for word in re.split(r"[^a-z0-9]+", re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", text).lower())
        if word in ARCHITECTURES and text != "gpt"  # also what files of chats call the assistant
    ]
    assert not named


FACTORS = re.compile(r"lora_(embedding_)?[AB]\b")
SHAPE_CLASSES = re.compile(r"\b\w+Shape\b")
OWN_FILES = ("contract.py", "shapes", "methods", "inits")


def test_no_caller_names_a_factor_or_the_class_of_a_shape() -> None:
    """What an adapter holds is declared by its method and the layer's shape; all others read the declaration."""
    named = []
    for file in FILES:
        folders = file.relative_to(ROOT).parts
        if folders[0] == "layers" and folders[1] in OWN_FILES:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, documented) and n.body and
                 isinstance(n.body[0], ast.Expr)}  # fmt: skip
        for node in ast.walk(tree):
            word = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "value", None)
            if not isinstance(word, str) or id(node) in texts:
                continue
            if FACTORS.search(word) or (SHAPE_CLASSES.search(word) and not isinstance(node, ast.Constant)):
                named.append(f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: {word}")
    assert not named

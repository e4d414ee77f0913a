"""The functions of transformers' loader that tell where a tensor lies on disk are those that were seen."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

from hf_lora import compat
from hf_lora.file_merge import naming


@pytest.mark.parametrize("path", compat.LOADING)
def test_names_and_parameters_are_those_that_are_installed(path: str) -> None:
    module, *names = path.split(".")
    found: Any = importlib.import_module(f"transformers.{module}")
    for name in names:
        found = getattr(found, name)
    parameters = [name for name in inspect.signature(found).parameters if name != "self"]
    assert tuple(parameters[: len(compat.LOADING[path])]) == compat.LOADING[path]


def test_nothing_else_is_asked_of_the_loader() -> None:
    asked = {
        f"{node.module.removeprefix('transformers.')}.{alias.name}"
        for node in ast.walk(ast.parse(Path(str(naming.__file__)).read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers.")
        for alias in node.names
    }
    assert asked
    assert asked <= compat.LOADING.keys()

"""The versions that are needed are those of pyproject.toml, and others are one error at the first import."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import hf_lora
from hf_lora import VersionError
from hf_lora.versions import NEEDED, check_versions

ROOT = Path(hf_lora.__file__).parent.parent


def test_what_is_needed_is_what_the_package_asks_for() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = {re.split(r"[<>=]", line)[0]: line for line in wanted}
    for name, (low, high) in NEEDED.items():
        assert bounds[name] == f"{name}>={low}" + (f",<{high}" if high else "")


@pytest.mark.parametrize(
    ("name", "version", "right"),
    [
        ("transformers", "4.57.1", False), ("transformers", "5.17.0", True), ("transformers", "5.17", True),
        ("transformers", "6.0.0", False), ("torch", "2.9.1+cpu", False), ("torch", "2.11.0+cu126", True),
        ("torch", "2.13.0.dev20260101", True), ("accelerate", "1.10", False), ("huggingface_hub", "2.9", True),
    ],
)  # fmt: skip
def test_each_bound(name: str, version: str, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own = metadata.version
    monkeypatch.setattr(metadata, "version", lambda asked: version if asked == name else own(asked))
    check_versions.cache_clear()
    if right:
        check_versions()
        return
    with pytest.raises(VersionError, match=re.escape(f"{name} {version} is installed; {name}>={NEEDED[name][0]}")):
        check_versions()
    check_versions.cache_clear()


def test_they_are_checked_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom importlib import metadata\nown = metadata.version\n"
        "metadata.version = lambda name: '4.40.0' if name == 'transformers' else own(name)\n"
        "from hf_lora import LoraConfig\n"
        "try:\n    from hf_lora import LoraTrainer\nexcept ImportError as error:\n    print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "transformers 4.40.0 is installed; transformers>=5.17,<6 is needed" in done.stdout
    assert 'Run: pip install -U "transformers>=5.17,<6"' in done.stdout
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("TaskType", 'task_type="SEQ_CLS"'), ("PeftModel", "LoraModel"), ("PeftModelForCausalLM", "LoraModel"),
        ("AutoPeftModelForSequenceClassification", 'LoraModel.from_pretrained("adapter")'),
        ("PeftConfig", "LoraConfig"), ("prepare_model_for_kbit_training", "apply_lora"),
        ("initialize_lora_eva_weights", "LoraConfig"), ("preprocess_loraga", "LoraConfig"),
    ],
)  # fmt: skip
def test_names_of_peft_say_what_takes_their_place(name: str, instead: str) -> None:
    import peft

    assert hasattr(peft, name)
    namespace: dict[str, Any] = {}
    with pytest.raises(ImportError, match=re.escape(instead)):
        exec(f"from hf_lora import {name}", namespace)
    for used in re.findall(r"\b(LoraModel|LoraConfig|apply_lora)\b", instead):
        assert used in hf_lora.__all__


def test_every_replacement_is_for_a_name_of_peft() -> None:
    import peft.optimizers
    import peft.tuners.lora.corda
    import peft.utils.hotswap

    modules = (peft, peft.optimizers, peft.tuners.lora.corda, peft.utils.hotswap)
    assert [name for name in hf_lora._IN_PEFT if not any(hasattr(module, name) for module in modules)] == []


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("LoraSFTTrainer", "trl", 'pip install "hf_lora[chat]"'),
        ("LoraSentenceTransformerTrainer", "sentence_transformers", "pip install sentence-transformers"),
    ],
)
def test_a_name_whose_package_is_missing_says_what_installs_it(name: str, module: str, command: str) -> None:
    code = f"import sys\nsys.modules[{module!r}] = None\nfrom hf_lora import {name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == f"hf_lora.errors.VersionError: {name} needs {module}. Run: {command}"

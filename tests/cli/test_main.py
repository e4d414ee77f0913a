"""The command itself: fast help, errors as messages."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from hf_lora import __version__
from hf_lora.cli.main import app, main
from hf_lora.cli.quiet import LOGGERS

HEAVY = ("torch", "transformers", "numpy", "datasets", "accelerate")


def test_help_imports_nothing_heavy_and_is_fast() -> None:
    code = (
        "import sys\nfrom hf_lora.cli import main\nsys.argv = ['hf-lora', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    assert "HEAVY []" in done.stdout
    assert all(command in done.stdout for command in ("train", "merge", "convert", "inspect"))
    assert seconds < 1.5, f"--help took {seconds:.2f} s; 0.5 s is meant, on an idle machine"


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == f"hf-lora {__version__}"


@pytest.mark.parametrize("command", ["train", "merge", "convert", "inspect"])
def test_each_command_has_help(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "--" in result.output


def test_our_errors_are_one_message_and_exit_code_2(tmp_path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {tmp_path} is not an adapter's folder")
    assert "Traceback" not in result.output


def test_warnings_of_imported_libraries_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        CliRunner().invoke(app, ["inspect", "nothing-is-here"])
    for name in LOGGERS:
        logger = logging.getLogger(name)
        assert len(logger.filters) == 1
        logger.setLevel(logging.DEBUG)  # as the libraries do
        logger.warning("what nobody can change")
        logger.error("what matters in %s", name)
    assert "what nobody can change" not in caplog.text
    assert [r.name for r in caplog.records if "what matters" in r.getMessage()] in (list(LOGGERS), list(LOGGERS[:3]))


def test_characters_that_the_console_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    monkeypatch.setattr(sys, "argv", ["hf-lora", "generate", "adapter", "--prompt", "hi"])
    monkeypatch.setattr("hf_lora.generate.texts.generate_answers", lambda *args, **options: ["5 € → 日本"])
    with pytest.raises(SystemExit) as end:
        main()
    sys.stdout.flush()
    assert end.value.code == 0
    assert raw.getvalue().decode("cp1252").strip() == "5 € \\u2192 \\u65e5\\u672c"

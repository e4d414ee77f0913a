"""The `hf-lora` command. Large libraries are imported when a command runs, so `--help` is fast.

In: arguments and YAML files. Out: printed text and an exit code. Each command is one call to one public function.

- `main`: the command itself; a new one is a file with `register(app)` and a line here.
- `train`, `eval`: training and evaluation on files.
- `init`, `recommend`, `targets`, `env`: a file of options, settings with reasons, what would be adapted, and on what
  machine.
- `generate`: `chat` and `generate`.
- `files`: `merge`, `convert` and `inspect`.
- `hub`: `push` and `pull`.
- `quiet`: warnings of imported libraries that are dropped.
- `words`: messages of the library in the words of a command.
"""

from __future__ import annotations

from .main import main

__all__ = ["main"]

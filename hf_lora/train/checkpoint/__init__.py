"""Checkpoints of an adapter and its optimizer; incomplete ones are ignored.

In: a trainer's state and a folder. Out: `checkpoint-<step>` folders, and a run resumed from one of them.

- `manifest`: the list of files of a complete checkpoint, and the newest complete one in a folder.
- `fields`: the facts of a run in the manifest that must match when it resumes; a new one is one entry.
- `store`: writes and reads adapters, optimizer and schedule.
- `outside`: the modules around the adapted model, such as dense layers of sentence-transformers.
- `pushing`: pushes to the Hub for every `hub_strategy`.
- `sigterm`: saves between two steps on SIGTERM.
- `state_hooks`: adapters in the checkpoints of training loops with Accelerate but without Trainer.
"""

"""Checkpoints that hold an adapter and its optimizer, and are complete or do not count.

In: a trainer's state and a folder. Out: `checkpoint-<step>` folders, and a run that goes on where one of them was.

- `manifest`: what a complete checkpoint lists, and the newest one of a folder.
- `fields`: what the manifest says of the run, and what must be the same where a run resumes; one more is one entry.
- `store`: writes and reads adapters, optimizer and schedule.
- `pushing`: what goes to the Hub with every `hub_strategy`.
- `sigterm`: saving between two steps when the process is asked to end.
- `state_hooks`: the same files for loops with Accelerate and without a Trainer.
"""

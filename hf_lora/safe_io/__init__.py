"""Bytes and files: reading files that nobody vouches for, and writing files that are whole or absent.

In: paths. Out: JSON values and safetensors headers, each read within bounds; files that take their places together.

- `reading`: which files are opened, how much of them is read, and what a safetensors header may say.
- `atomic`: several files that replace others as one, whatever happens in between.
"""

"""Files: reading untrusted ones within bounds, and writing files that are whole or absent.

In: paths. Out: JSON values and safetensors headers; files that take their places together.

- `reading`: which files are opened, and JSON within bounds.
- `headers`: safetensors headers: which tensor lies where.
- `atomic`: several files that replace others together, or not at all.
"""

"""Reading untrusted files with limits, and writing files atomically.

In: paths. Out: JSON values and safetensors headers; files that are replaced together.

- `reading`: which files are opened, and JSON with limits.
- `headers`: safetensors headers, validated.
- `atomic`: replace several files together, or none.
"""

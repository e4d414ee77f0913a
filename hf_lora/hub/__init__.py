"""Adapters on the Hub. The only package that uses the network.

In: a folder and the name of a repository. Out: one commit or none, or a folder with the files of one revision.

- `upload`, `share`: push a folder, or the adapters of a model, as one commit.
- `download`, `base`: pull an adapter's files, or a base model's, from one revision.
- `snapshot`, `network`, `names`: files of one commit; requests with retries; names of files and repositories.
- `card/`: the README of an adapter.
"""

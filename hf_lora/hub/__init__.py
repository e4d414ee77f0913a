"""Adapters on the Hub. The only package that uses the network.

In: a folder and a repository name. Out: one commit or none, or a folder with the files of one revision.

- `upload`, `share`: push a folder, or the adapters of a model, as one commit.
- `download`, `base`: download the files of an adapter or a base model from one revision.
- `snapshot`, `network`, `names`: the files of one commit; requests with retries; names of files and repositories.
- `card/`: the README of an adapter.
"""

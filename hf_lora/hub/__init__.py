"""Adapters on the Hub. The only package that uses the network.

In: a folder and the name of a repository. Out: a commit that is there or is not, or a folder of one revision.

- `push`, `share`: a folder, or the adapters of a model, as one commit.
- `pull`, `base`: an adapter's files, or a base model's, from one revision.
- `place`, `network`, `names`: one repository, requests with retries, and which names and files are an adapter's.
- `card/`: the README of an adapter.
"""

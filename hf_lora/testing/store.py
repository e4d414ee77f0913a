"""The data of a `LocalHub` in memory: repositories like those of git, large files, users and tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".model", ".png")
"""Endings of names that the Hub's .gitattributes assigns to large file storage."""
LARGE_BYTES = 10_000_000


@dataclass(frozen=True)
class Blob:
    """The content of one file, in git itself or in large file storage (`lfs`)."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """The pointer that git stores instead of a large file."""
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()
        )

    @cached_property
    def oid(self) -> str:
        """The git hash of the object."""
        held = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(held) + held, usedforsecurity=False).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """A snapshot of all files, and its parent."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    tree: Mapping[str, Blob]


@dataclass
class PullRequest:
    num: int
    title: str
    author: str
    date: str
    base: str
    status: str = "open"


@dataclass
class User:
    """The owner of a token, which is read-only without `write`."""

    name: str
    token: str
    write: bool = True


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def is_large(path: str, size: int, sample: bytes = b"") -> bool:
    """Whether the Hub would store a file in large file storage."""
    return path.endswith(LARGE) or size > LARGE_BYTES or b"\0" in sample


@dataclass
class Repo:
    """One repository: branches, tags and pull requests refer to commits."""

    repo_id: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    """Users other than the owner who may read it if it is private or gated."""
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, PullRequest] = field(default_factory=dict)
    pull_heads: dict[int, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.repo_id.partition("/")[0]

    def resolve(self, revision: str) -> str | None:
        """The commit for a branch, tag, `refs/…` or commit hash; None if it does not exist."""
        if revision.startswith("refs/pr/") and revision[8:].isdigit():
            return self.pull_heads.get(int(revision[8:]))
        plain = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        for named in (self.branches, self.tags):
            if plain in named:
                return named[plain]
        if len(revision) >= 7:
            return next((oid for oid in self.commits if oid.startswith(revision)), None)
        return None

    def history(self, revision: str) -> list[Commit]:
        """The history of a revision, newest first."""
        found, oid = [], self.resolve(revision)
        while oid is not None:
            found.append(self.commits[oid])
            oid = self.commits[oid].parent
        return found

    def add(
        self, parent: str | None, tree: Mapping[str, Blob], title: str, message: str = "", author: str = ""
    ) -> str:
        """Add a commit that no branch refers to yet, and return its hash."""
        seed = repr((self.repo_id, len(self.commits), parent, title, sorted((p, b.oid) for p, b in tree.items())))
        oid = hashlib.sha1(seed.encode(), usedforsecurity=False).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, message, author or self.owner, now(), dict(tree))
        return oid

    def put(self, files: Mapping[str, bytes], title: str = "files", revision: str = "main") -> str:
        """Add files to a branch in one commit, as a push would."""
        head = self.branches.get(revision) or self.branches["main"]
        tree = dict(self.commits[head].tree)
        tree |= {path: Blob(data, is_large(path, len(data), data[:512])) for path, data in files.items()}
        self.branches[revision] = self.add(head, tree, title)
        return self.branches[revision]

    def open_pull(self, title: str, author: str, head: str, base: str) -> PullRequest:
        pull = PullRequest(len(self.pulls) + 1, title, author, now(), base)
        self.pulls[pull.num] = pull
        self.pull_heads[pull.num] = head
        return pull

    def merge_pull(self, num: int) -> None:
        """Merge a pull request into its branch, in one commit."""
        pull, head = self.pulls[num], self.commits[self.pull_heads[num]]
        base = self.branches[pull.base]
        tree = {**self.commits[base].tree, **head.tree}
        self.branches[pull.base] = self.add(base, tree, f"{pull.title} (#{num})", author=pull.author)
        pull.status = "merged"

    def reads(self, user: User | None) -> bool:
        """Whether a user may read the files."""
        return user is not None and (user.name == self.owner or user.name in self.readers)


def new_repo(repo_id: str, private: bool = False, gated: bool = False) -> Repo:
    """A new repository as the Hub creates it: one commit with .gitattributes."""
    repo = Repo(repo_id, private, gated)
    attributes = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LARGE)
    repo.branches["main"] = repo.add(None, {".gitattributes": Blob(attributes.encode())}, "initial commit")
    return repo

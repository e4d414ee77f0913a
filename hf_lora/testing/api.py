"""The responses of a `LocalHub`: the part of the Hub's API that pushing and pulling a model use."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any
from urllib.parse import parse_qs, quote

from .server import Reply, Request, answer
from .store import Blob, Commit, Repo, User, is_large, new_repo

_VERBS = {
    "revision", "tree", "preupload", "commit", "commits", "branch", "tag", "refs", "discussions", "paths-info",
    "settings",
}  # fmt: skip


class Refusal(Exception):
    """An error response."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply = answer({"error": message}, status, **named, **headers)


class Api:
    """State and responses; `server.Server` handles HTTP."""

    def __init__(self) -> None:
        self.url = ""
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, User] = {}
        """Token -> its owner."""
        self.large: dict[str, bytes] = {}
        """Large file storage: sha256 -> verified content."""
        self.arrived: dict[str, dict[int, bytes]] = {}
        """Unverified uploads: sha256 -> part -> content."""
        self.chunk_size: int | None = None
        """Uploads larger than this are split into parts; None: never split."""

    def respond(self, request: Request) -> Reply:
        try:
            return self._route(request)
        except Refusal as refusal:
            return refusal.reply
        except (KeyError, ValueError, TypeError) as error:
            return answer({"error": f"bad request: {error!r}"}, 400)

    def _route(self, request: Request) -> Reply:
        parts, method = request.parts, request.method
        if parts[:1] == ["api"]:
            if parts == ["api", "whoami-v2"]:
                return self._whoami(request)
            if parts == ["api", "repos", "create"] and method == "POST":
                return self._create(request)
            if parts == ["api", "repos", "delete"] and method == "DELETE":
                return self._delete(request)
            if parts == ["api", "validate-yaml"]:
                return answer({"errors": [], "warnings": []})
            if parts[1:2] == ["models"] and len(parts) > 2:
                single = len(parts) == 3 or parts[3] in _VERBS
                repo_id, rest = ("/".join(parts[2 : 3 if single else 4]), parts[3 if single else 4 :])
                return self._models(request, repo_id, rest)
        if parts[:1] == ["large-files"] and method in ("PUT", "POST"):
            return self._receive(request)
        if parts[-3:] == ["lfs", "objects", "batch"]:
            return self._batch(request, "/".join(parts[:-4]).removesuffix(".git"))
        if "resolve" in parts[1:3]:
            at = parts.index("resolve", 1)
            return self._resolve(request, "/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]))
        raise Refusal(404, f"{method} {request.path} is not part of this server")

    # Permissions -----------------------------------------------------------------------------------------------------

    def _user(self, request: Request) -> User | None:
        if request.token is None:
            return None
        if request.token not in self.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.users[request.token]

    def _writer(self, request: Request, repo: Repo | None = None) -> User:
        user = self._user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if not user.write or (repo is not None and repo.owner != user.name):
            what = repo.repo_id if repo is not None else "this namespace"
            raise Refusal(403, f"Forbidden: you don't have the permission to write to {what}")
        return user

    def _repo(self, request: Request, repo_id: str) -> Repo:
        """A repository that the user may see. A private one appears not to exist."""
        user, repo = self._user(request), self.repos.get(repo_id)
        if repo is None or (repo.private and not repo.reads(user)):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _at(self, repo: Repo, revision: str) -> str:
        oid = repo.resolve(revision)
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # Accounts and repositories ---------------------------------------------------------------------------------------

    def _whoami(self, request: Request) -> Reply:
        user = self._user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        role = "write" if user.write else "read"
        token = {"displayName": "local", "role": role}
        return answer(
            {
                "type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": [],
                "auth": {"type": "access_token", "accessToken": token},
            }
        )  # fmt: skip

    def _create(self, request: Request) -> Reply:
        values, user = request.json(), self._writer(request)
        if values.get("type", "model") != "model":
            raise Refusal(400, "this server supports only models")
        if values.get("organization") not in (None, user.name):
            raise Refusal(403, f"Forbidden: {user.name} cannot create a model in {values['organization']}")
        repo_id = f"{user.name}/{values['name']}"
        made = {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repos:
            return answer({"error": "You already created this model repo", **made}, 409)
        private = values.get("visibility") == "private" or bool(values.get("private"))
        self.repos[repo_id] = new_repo(repo_id, private)
        return answer(made)

    def _delete(self, request: Request) -> Reply:
        values = request.json()
        repo_id = "/".join(x for x in (values.get("organization"), values["name"]) if x)
        repo_id = repo_id if "/" in repo_id else f"{self._writer(request).name}/{repo_id}"
        self._writer(request, self._repo(request, repo_id))
        del self.repos[repo_id]
        return answer({})

    def _models(self, request: Request, repo_id: str, rest: list[str]) -> Reply:
        repo = self._repo(request, repo_id)
        verb, rest = (rest[0], rest[1:]) if rest else ("revision", [])
        if verb == "revision":
            return self._info(repo, self._at(repo, "/".join(rest) or "main"), "blobs" in request.query)
        if verb == "tree":
            commit = repo.commits[self._at(repo, rest[0])]
            inside = "".join(f"{part}/" for part in rest[1:])
            return answer([_entry(p, b) for p, b in sorted(commit.tree.items()) if p.startswith(inside)])
        if verb == "paths-info":
            tree, wanted = repo.commits[self._at(repo, rest[0])].tree, parse_qs(request.body.decode())["paths"]
            return answer([_entry(path, tree[path]) for path in wanted if path in tree])
        if verb == "commits":
            return answer([_described(c) for c in repo.history(rest[0])] if self._at(repo, rest[0]) else [])
        if verb == "refs":
            return self._refs(repo, request.query.get("include_prs") in ("1", "true", "True"))
        if verb == "preupload":
            return self._preupload(request, repo, rest[0])
        if verb == "commit":
            return self._commit(request, repo, rest[0])
        if verb == "branch":
            return self._branch(request, repo, "/".join(rest))
        if verb == "tag":
            return self._tag(request, repo, rest[0])
        if verb == "discussions":
            return self._discussions(request, repo, rest)
        if verb == "settings":
            self._writer(request, repo)
            values = request.json()
            repo.private = values.get("visibility", "private" if values.get("private") else "public") == "private"
            return answer({"private": repo.private})
        raise Refusal(404, f"{request.path} is not part of this server")

    def _info(self, repo: Repo, oid: str, with_blobs: bool) -> Reply:
        tree = repo.commits[oid].tree
        siblings = [{"rfilename": path, **(_blob(tree[path]) if with_blobs else {})} for path in sorted(tree)]
        return answer(
            {
                "_id": repo.repo_id, "id": repo.repo_id, "modelId": repo.repo_id, "author": repo.owner, "sha": oid,
                "private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False,
                "lastModified": repo.commits[oid].date, "createdAt": repo.commits[oid].date, "tags": [],
                "downloads": 0, "likes": 0, "siblings": siblings,
            }
        )  # fmt: skip

    def _refs(self, repo: Repo, with_pulls: bool) -> Reply:
        def listed(names: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in names.items()]

        values: dict[str, object] = {"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags")}
        values["converts"] = []
        if with_pulls:
            values["pullRequests"] = listed({str(n): oid for n, oid in repo.pull_heads.items()}, "pr")
        return answer(values)

    def _branch(self, request: Request, repo: Repo, name: str) -> Reply:
        self._writer(request, repo)
        if request.method == "DELETE":
            if repo.branches.pop(name, None) is None:
                raise Refusal(404, f"no branch {name}", "RevisionNotFound")
            return answer({})
        if name.startswith("refs/"):
            raise Refusal(400, f"Invalid reference for a branch: {name}")
        if name in repo.branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{name}")
        repo.branches[name] = self._at(repo, request.json().get("startingPoint") or "main")
        return answer({})

    def _tag(self, request: Request, repo: Repo, revision: str) -> Reply:
        self._writer(request, repo)
        if request.method == "DELETE":
            if repo.tags.pop(revision, None) is None:
                raise Refusal(404, f"no tag {revision}", "RevisionNotFound")
            return answer({})
        name = request.json()["tag"]
        if name in repo.tags:
            raise Refusal(409, f"Tag reference exists already: {name}")
        repo.tags[name] = self._at(repo, revision)
        return answer({})

    def _discussions(self, request: Request, repo: Repo, rest: list[str]) -> Reply:
        user = self._user(request)
        if request.method == "POST" and user is None:
            raise Refusal(401, "Invalid username or password.")
        if not rest and request.method == "POST":
            assert user is not None
            title = request.json()["title"]
            pull = repo.open_pull(title, user.name, repo.branches["main"], "main")
            return answer({"num": pull.num, "url": self._pull_url(repo, pull.num), "pullRequest": True})
        if rest[1:] == ["merge"] and request.method == "POST":
            self._writer(request, repo)
            repo.merge_pull(int(rest[0]))
            return answer({})
        if rest:
            raise Refusal(404, f"{request.path} is not part of this server")
        found = [
            {
                "num": p.num, "title": p.title, "author": {"name": p.author}, "createdAt": p.date, "status": p.status,
                "isPullRequest": True, "repo": {"name": repo.repo_id, "type": "model"},
            }
            for p in repo.pulls.values()
            if request.query.get("status") in (None, "all", p.status)
        ]  # fmt: skip
        return answer({"discussions": found, "count": len(found), "start": 0})

    def _pull_url(self, repo: Repo, num: int) -> str:
        return f"{self.url}/{repo.repo_id}/discussions/{num}"

    # Uploads ---------------------------------------------------------------------------------------------------------

    def _may_commit(self, request: Request, repo: Repo) -> User:
        """Anyone with a token may open a pull request; only the owner commits to a branch."""
        if request.query.get("create_pr") != "1":
            return self._writer(request, repo)
        user = self._user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def _preupload(self, request: Request, repo: Repo, revision: str) -> Reply:
        self._may_commit(request, repo)
        tree = repo.commits[self._at(repo, revision)].tree
        files = []
        for file in request.json()["files"]:
            path = file["path"]
            large = is_large(path, file["size"], base64.b64decode(file["sample"]))
            here = {"oid": tree[path].etag} if path in tree and tree[path].lfs == large else {}
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **here})
        return answer({"files": files})

    def _batch(self, request: Request, repo_id: str) -> Reply:
        self._repo(request, repo_id)
        if self._user(request) is None:
            raise Refusal(401, "Invalid username or password.")
        objects = []
        for wanted in request.json()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict[str, object] = {"oid": oid, "size": size}
            if oid not in self.large:
                href = f"{self.url}/large-files/{oid}"
                upload: dict[str, object] = {"href": href}
                if self.chunk_size is not None and size > self.chunk_size:
                    count = -(-size // self.chunk_size)
                    urls = {f"{i:05d}": f"{href}/part/{i}" for i in range(1, count + 1)}
                    upload = {"href": f"{href}/complete", "header": {"chunk_size": str(self.chunk_size), **urls}}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{href}/verify"}}
            objects.append(entry)
        return answer({"transfer": "basic", "objects": objects})

    def _receive(self, request: Request) -> Reply:
        oid, rest = request.parts[1], request.parts[2:]
        arrived = self.arrived.setdefault(oid, {})
        if request.method == "PUT":
            arrived[int(rest[1]) if rest else 0] = request.body
            return Reply(200, b"", {"ETag": f'"{hashlib.md5(request.body, usedforsecurity=False).hexdigest()}"'})
        if rest == ["complete"]:
            numbers = [part["partNumber"] for part in request.json()["parts"]]
            if numbers != sorted(arrived):
                raise Refusal(400, f"parts {numbers} were named, but {sorted(arrived)} arrived")
            return answer({})
        data = b"".join(arrived[i] for i in sorted(arrived))
        size = request.json()["size"]
        if len(data) != size or hashlib.sha256(data).hexdigest() != oid:
            self.arrived.pop(oid)
            raise Refusal(422, f"the object that arrived is not {oid} of {size} bytes")
        self.large[oid] = data
        return answer({})

    def _commit(self, request: Request, repo: Repo, revision: str) -> Reply:
        user = self._may_commit(request, repo)
        head = self._at(repo, revision)
        as_pull = request.query.get("create_pr") == "1"
        tree, header = dict(repo.commits[head].tree), dict[str, Any]()
        for line in request.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                tree[_safe(value["path"])] = Blob(base64.b64decode(value["content"], validate=True))
            elif key == "lfsFile":
                if value["oid"] not in self.large:
                    raise Refusal(400, f"LFS pointer of {value['path']} points to no object: {value['oid']}")
                tree[_safe(value["path"])] = Blob(self.large[value["oid"]], lfs=True)
            elif key == "deletedFile":
                if tree.pop(value["path"], None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                inside = value["path"].rstrip("/") + "/"
                tree = {p: b for p, b in tree.items() if not p.startswith(inside)}
            else:
                raise Refusal(400, f"unknown operation {key}")
        if header.get("parentCommit") not in (None, head):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        if not header.get("summary"):
            raise Refusal(400, "a commit needs a summary")
        if not as_pull and revision not in repo.branches and not revision.startswith("refs/pr/"):
            raise Refusal(400, f"{revision} is not a branch")
        oid = repo.add(head, tree, header["summary"], header.get("description", ""), user.name)
        values: dict[str, object] = {"success": True, "commitOid": oid}
        values["commitUrl"] = f"{self.url}/{repo.repo_id}/commit/{oid}"
        if as_pull:
            pull = repo.open_pull(header["summary"], user.name, oid, revision)
            values["pullRequestUrl"] = self._pull_url(repo, pull.num)
        elif revision.startswith("refs/pr/"):
            repo.pull_heads[int(revision[8:])] = oid
        else:
            repo.branches[revision] = oid
        return answer(values)

    # Downloads -------------------------------------------------------------------------------------------------------

    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Reply:
        repo = self._repo(request, repo_id)
        user = self._user(request)
        if repo.gated and not repo.reads(user):
            message = f"Access to model {repo_id} is restricted. You must have access to it and be authenticated."
            raise Refusal(401 if user is None else 403, message, "GatedRepo")
        oid = self._at(repo, revision)
        blob = repo.commits[oid].tree.get(path)
        if blob is None:
            raise Refusal(404, f"Entry not found: {path}", "EntryNotFound", **{"X-Repo-Commit": oid})
        headers = {
            "X-Repo-Commit": oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.rpartition('/')[2])}",
        }  # fmt: skip
        if blob.lfs:
            headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        return Reply(200, blob.data, headers)


def _safe(path: str) -> str:
    if not path or path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")):
        raise Refusal(400, f"{path!r} is not a valid path in a repository")
    return path


def _blob(blob: Blob) -> dict[str, object]:
    lfs = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)} if blob.lfs else None
    return {"size": len(blob.data), "blobId": blob.oid, "lfs": lfs}


def _entry(path: str, blob: Blob) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry


def _described(commit: Commit) -> dict[str, object]:
    return {
        "id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date,
        "authors": [{"user": commit.author}],
    }  # fmt: skip

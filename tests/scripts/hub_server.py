"""A hub on this machine that answers both clients as the real ones do, and fails on request."""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Bytes from which a file is listed with its SHA-256 and served by another host, as Git LFS does.
LARGE = 10**6


class Request(NamedTuple):
    file: str  # its name
    start: int  # first byte
    host: str
    authorization: str | None


class HubServer:
    """`repos[kind, name]` holds the files of a repository: {file name: bytes}.

    Faults, each by file name: `cut_after` closes the connection once after so many bytes, then
    `reset_after` resets it once, then `stall_after` goes silent until `resume` is set. `gone` files
    are listed but answered with 404, `replaced` ones served with other bytes, `sizes` are listed in
    place of the true ones. With `portal`, a page of text answers everything. `requests` are the
    files that were asked for, in order.

    Files can be uploaded to either hub: small ones in the commit, large ones as Git LFS does it.
    That takes the token `writer`; any other is answered with 401.
    """

    def __init__(self):
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {}
        self.cut_after: dict[str, int] = {}
        self.reset_after: dict[str, int] = {}
        self.stall_after: dict[str, int] = {}
        self.gone: set[str] = set()
        self.replaced: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        self.portal = False
        self.writer = "hf_secret"
        self.blobs: dict[str, bytes] = {}  # SHA-256 -> an uploaded large file
        self.requests: list[Request] = []
        self.sent: dict[str, int] = {}  # bytes of each file's last answer
        self.resume = threading.Event()
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def port(self) -> int:
        return self.server.server_address[1]

    def close(self) -> None:
        self.resume.set()
        self.server.shutdown()
        self.server.server_close()

    def env(self, home: Path) -> dict[str, str]:
        """What sends both clients here, with nothing of the person's own settings."""
        here = f"http://127.0.0.1:{self.port}"
        return {
            "HF_ENDPOINT": here,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_secret",
            # Large files over HTTP.
            "HF_HUB_DISABLE_XET": "1",
            "MODELSCOPE_API_TOKEN": "hf_secret",
            "MODELSCOPE_DOMAIN": here,
            "MODELSCOPE_HOME": str(home / "ms"),
            "MODELSCOPE_CACHE": str(home / "ms_cache"),
            "no_proxy": "*",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.hub.portal:
            return self.send_body(b"<html>Please log in.</html>", "text/html")
        url = urlsplit(self.path)
        path = unquote(url.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        answers = (
            (r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/revision/[^/]+)?", self.list_huggingface),
            (r"/((?:datasets/)?)([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve_huggingface),
            (r"/storage/(model|dataset)/([^/]+/[^/]+)/(.+)", self.send_file),
            (r"/api/v1/(model|dataset)s/([^/]+/[^/]+)/repo/(?:files|tree)", self.list_modelscope),
            (
                r"/api/v1/(model|dataset)s/([^/]+/[^/]+)/repo",
                lambda *found: self.send_file(*found, query["FilePath"]),
            ),
            (r"/api/v1/repos/internalAccelerationInfo", lambda: self.send_json({"Data": {}})),
        )
        for pattern, answer in answers:
            if found := re.fullmatch(pattern, path):
                return answer(*found.groups())
        return self.send_json({"error": f"no such page: {path}"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.hub.portal:
            return self.send_body(b"<html>Please log in.</html>", "text/html")
        if self.hub.writer not in self.headers.get("Authorization", ""):
            return self.send_json({"error": "Invalid username or password."}, 401)
        answers = (
            (r"/api/validate-yaml", lambda: self.send_json({"errors": [], "warnings": []})),
            (r"/api/repos/create", lambda: self.create(body)),
            (r"/api/v1/models", lambda: self.create(body)),
            (r"/api/models/([^/]+/[^/]+)/preupload/main", lambda _: self.preupload(body)),
            (r"/(.+/.+)/info/lfs/objects/batch", lambda _: self.offer_places(body)),
            (r"/api/models/([^/]+/[^/]+)/commit/main", lambda repo: self.commit(repo, body)),
            (
                r"/api/v1/repos/models/([^/]+/[^/]+)/commit/master",
                lambda repo: self.commit_modelscope(repo, body),
            ),
        )
        for pattern, answer in answers:
            if found := re.fullmatch(pattern, unquote(urlsplit(self.path).path)):
                return answer(*found.groups())
        return self.send_json({"error": f"no such page: {self.path}"}, 404)

    def do_PUT(self) -> None:
        """A large file comes to the place that was offered, the name of its digest."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        digest = hashlib.sha256(content).hexdigest()
        self.hub.blobs[digest] = content
        self.send_json({"Code": 200}, 200 if self.path == f"/blobs/{digest}" else 400)

    def create(self, body: bytes) -> None:
        facts = json.loads(body)
        owner = facts.get("organization") or facts.get("Owner") or facts.get("Path")
        name = f"{owner}/{facts.get('name') or facts.get('Name')}"
        url = f"http://127.0.0.1:{self.hub.port}/{name}"
        if ("model", name) in self.hub.repos:
            return self.send_json({"error": "You already created this repo", "url": url}, 409)
        self.hub.repos["model", name] = {}
        return self.send_json({"url": url, "Code": 200, "Data": {}, "Success": True})

    def preupload(self, body: bytes) -> None:
        files = [
            {"path": file["path"], "shouldIgnore": False, "uploadMode": mode}
            for file in json.loads(body)["files"]
            for mode in ["lfs" if file["size"] >= LARGE else "regular"]
        ]
        self.send_json({"files": files})

    def offer_places(self, body: bytes) -> None:
        """Git LFS: where each large file can be put."""
        objects = [
            {**one, "actions": {"upload": {"href": self.blob_url(one["oid"])}}}
            for one in json.loads(body)["objects"]
        ]
        answer = {"transfer": "basic", "objects": objects}
        self.send_json(answer | {"Code": 200, "Data": answer, "Success": True})

    def blob_url(self, digest: str) -> str:
        return f"http://127.0.0.1:{self.hub.port}/blobs/{digest}"

    def commit(self, repo: str, body: bytes) -> None:
        files = self.hub.repos["model", repo]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        url = f"http://127.0.0.1:{self.hub.port}/{repo}/commit/{COMMIT}"
        self.send_json({"commitUrl": url, "commitOid": COMMIT})

    def commit_modelscope(self, repo: str, body: bytes) -> None:
        for action in json.loads(body)["actions"]:
            is_large = action["type"] == "lfs"
            content = self.hub.blobs[action["sha256"]] if is_large else action["content"]
            content = content if is_large else base64.b64decode(content)
            self.hub.repos["model", repo][action["path"]] = content
        self.send_json({"Code": 200, "Data": {"oid": COMMIT}, "Success": True})

    def listed(self, kind: str, repo: str) -> list[tuple[str, bytes, int]]:
        files = self.hub.repos[kind, repo]
        return [
            (name, content, self.hub.sizes.get(name, len(content)))
            for name, content in files.items()
        ]

    def list_huggingface(self, kind: str, repo: str) -> None:
        if (kind, repo) not in self.hub.repos:
            return self.send_json(
                {"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"}
            )
        siblings = []
        for name, content, size in self.listed(kind, repo):
            blob_id = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
            entry = {"rfilename": name, "size": size, "blobId": blob_id}
            if size >= LARGE:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
            siblings.append(entry)
        return self.send_json(
            {"_id": "1", "id": repo, "sha": COMMIT, "private": False, "siblings": siblings}
        )

    def resolve_huggingface(self, datasets: str, repo: str, revision: str, name: str) -> None:
        kind = "dataset" if datasets else "model"
        content = self.hub.repos.get((kind, repo), {}).get(name, b"")
        if revision != COMMIT:
            return self.send_json(
                {"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"}
            )
        if len(content) < LARGE or name in self.hub.gone:
            return self.send_file(kind, repo, name)
        self.send_response(302)
        self.send_header(
            "Location", f"http://localhost:{self.hub.port}/storage/{kind}/{repo}/{name}"
        )
        self.send_header("Content-Length", "0")
        return self.end_headers()

    def list_modelscope(self, kind: str, repo: str) -> None:
        if (kind, repo) not in self.hub.repos:
            return self.send_json(
                {"Code": 10010205001, "Message": "not found", "Success": False}, 404
            )
        files = []
        for name, content, size in self.listed(kind, repo):
            digest = hashlib.sha256(content).hexdigest()
            entry = {"Path": name, "Name": name, "Size": size, "Sha256": digest, "Type": "blob"}
            files.append(entry)
        return self.send_json({"Code": 200, "Data": {"Files": files}, "Success": True})

    def send_json(
        self, value: dict, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_body(json.dumps(value).encode(), "application/json", status, headers)

    def send_body(
        self, body: bytes, kind: str, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, kind: str, repo: str, name: str) -> None:
        # note the request
        hub, asked = self.hub, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, host = int(asked[1]) if asked else 0, self.headers["Host"].split(":")[0]
        hub.requests.append(Request(name, start, host, self.headers.get("Authorization")))
        content = hub.replaced.get(name, hub.repos.get((kind, repo), {}).get(name))
        if content is None or name in hub.gone:
            return self.send_json(
                {"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"}
            )

        # answer
        body = content[start:]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()

        # send as much as the fault allows
        faults = (hub.cut_after, hub.reset_after, hub.stall_after)
        fault = next((fault for fault in faults if name in fault), None)
        with suppress(ConnectionError):
            sent = body if fault is None else body[: fault.pop(name)]
            self.wfile.write(sent)
            self.wfile.flush()
            hub.sent[name] = len(sent)
            if fault is hub.reset_after:
                # The client has read all by then.
                time.sleep(0.5)
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
            if fault is hub.stall_after:
                hub.resume.wait(60)
        self.close_connection = fault is not None
        return None

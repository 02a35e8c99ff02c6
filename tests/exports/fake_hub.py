"""A hub on this machine: it makes repositories and keeps the files that are pushed to it."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_of-the-test"


@dataclass
class FakeHub:
    """The state of the hub.

    Attributes:
        repositories: the visibility of each repository; True for a private one.
        files: the content of the files of each repository.
        requests: the method and the path of each request.
        refuses: a path whose requests are refused.
    """

    address: str = ""
    repositories: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    refuses: str = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """The status and the JSON of an answer."""
        self.requests.append((method, path))
        if self.refuses and path.startswith(self.refuses):
            return 403, {"error": "You have no right\nto do this.\x1b[31m"}
        match path.strip("/").split("/"):
            case ["api", "whoami-v2"]:
                return 200, {"name": "me", "type": "user"}
            case ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case ["api", "validate-yaml"]:
                return 200, {"errors": [], "warnings": []}
            case ["api", "models", owner, name]:
                return 200, {"id": f"{owner}/{name}", "private": self.repositories[f"{owner}/{name}"]}
            case ["api", "models", _, _, "preupload", "main"]:
                named = [one["path"] for one in json.loads(body)["files"]]
                return 200, {"files": [self._mode(name) for name in named]}
            case [_, _, "info", "lfs", "objects", "batch"]:
                found = json.loads(body)["objects"]
                return 200, {"transfer": "basic", "objects": [self._upload(one) for one in found]}
            case ["objects", oid]:
                assert hashlib.sha256(body).hexdigest() == oid
                self.objects[oid] = body
                return 200, {}
            case ["api", "models", owner, name, "commit", "main"]:
                return self._commit(f"{owner}/{name}", [json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"there is no {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = name in self.repositories
        self.repositories.setdefault(name, asked.get("visibility") == "private")
        return (409 if known else 200), {
            "url": f"{self.address}/{name}",
            "error": "it exists" if known else None,
        }

    def _mode(self, name: str) -> dict[str, Any]:
        mode = "lfs" if name.endswith(".safetensors") else "regular"
        return {"path": name, "uploadMode": mode, "shouldIgnore": False}

    def _upload(self, one: dict[str, Any]) -> dict[str, Any]:
        return {**one, "actions": {"upload": {"href": f"{self.address}/objects/{one['oid']}"}}}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        files = self.files.setdefault(name, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that answers on the loopback address while the block lasts."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body, path = self.rfile.read(length), urlsplit(self.path).path
            if not path.startswith("/objects/") and self.headers.get("authorization") != f"Bearer {TOKEN}":
                status, found = 401, {"error": "log in first"}
            else:
                status, found = hub.answer(self.command, path, body)
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _handle

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()

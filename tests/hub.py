"""A stand-in for the hub: the part of its HTTP interface that sharing a model needs, in memory."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Repositories by id, each a dictionary of files."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.address = ""

    def commit_of(self, repository: str) -> str:
        content = b"".join(sorted(self.repositories[repository].values()))
        return hashlib.sha1(content).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                hub.repositories.setdefault(name, {})
                self.answer({"url": f"{hub.address}/{name}", "id": name})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                regular = {"uploadMode": "regular", "shouldIgnore": False}
                self.answer({"files": [{"path": file["path"], **regular} for file in files]})
            elif "/commit/" in self.path:
                name = self.repository()
                for line in body.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        hub.repositories[name][entry["value"]["path"]] = content
                commit = hub.commit_of(name)
                url = f"{hub.address}/{name}/commit/{commit}"
                self.answer({"success": True, "commitOid": commit, "commitUrl": url})
            else:
                self.answer({"error": self.path}, 404)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            name = self.repository()
            if name not in hub.repositories:
                self.answer(
                    {"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"}
                )
            elif parts[0] == "api":
                files = [{"rfilename": path} for path in hub.repositories[name]]
                commit = hub.commit_of(name)
                entries = [
                    {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                    for path, content in hub.repositories[name].items()
                ]
                tree = "tree" in parts
                self.answer(entries if tree else {"id": name, "sha": commit, "siblings": files})
            elif parts[2] == "resolve" and parts[4] in hub.repositories[name]:
                content = hub.repositories[name][parts[4]]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", hub.commit_of(name))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)
            else:
                self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})

        def repository(self) -> str:
            parts = self.path.strip("/").split("/")
            return "/".join(parts[2:4] if parts[0] == "api" else parts[:2])

        def answer(
            self, tree: object, status: int = 200, headers: dict[str, str] | None = None
        ) -> None:
            body = json.dumps(tree).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


@contextmanager
def serving_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

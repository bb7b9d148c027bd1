"""As much of a W&B server as a run needs to start; then it can fall silent, as in an outage."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """Listens on this machine; `silent.set()` begins the outage: requests are never answered."""

    def __init__(self) -> None:
        self.silent = threading.Event()
        self.queries: list[dict[str, Any]] = []
        self.streamed: list[str] = []
        """Lines of history that runs have uploaded."""
        handler = type("Bound", (Handler,), {"owner": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self.http.shutdown()
        self.http.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers GraphQL with one user, one project, any run; accepts all else."""

    owner: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.owner.silent.is_set():
            time.sleep(600)
        if not self.path.endswith("/graphql"):
            if self.path.endswith("/file_stream"):
                files = json.loads(body or b"{}").get("files") or {}
                self.owner.streamed += files.get("wandb-history.jsonl", {}).get("content", [])
            return self._send({})
        request = json.loads(body)
        self.owner.queries.append(request)
        return self._send({"data": self._data(request)})

    do_GET = do_PUT = do_POST

    def _data(self, request: dict[str, Any]) -> dict[str, Any]:
        query, wanted = request["query"], request.get("variables") or {}
        if "upsertBucket" in query:
            project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
            names = {"id": "r", "name": wanted.get("name"), "displayName": "n"}
            bucket = {**names, "sweepName": None, "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "viewer" in query.lower():
            viewer = {"id": "u", "entity": "me", "username": "me", "name": "me", "flags": "{}"}
            viewer |= {"email": "me@here", "teams": {"edges": []}}
            return {"viewer": viewer, "serverInfo": {"cliVersionInfo": {}, "features": []}}
        if "serverInfo" in query:
            return {"serverInfo": {"features": [], "cliVersionInfo": {}}}
        if "CreateRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{self.owner.url}/put"} for n in wanted["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "RunResumeStatus" in query:
            return {"model": None}
        return {}

    def _send(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""

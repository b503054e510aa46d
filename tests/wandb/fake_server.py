"""A stand-in for the W&B server on loopback, enough for the real client: GraphQL, file stream,
uploads. Keeps what it gets.

An operation it does not know is answered as the real server answers a bad query (an error in a body
with status 200: the client retries other statuses for minutes) and kept in `unknown`, so that a
test notices when the client begins to ask more.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"
ENTITY, TEAM, PROJECT = "ada", "analytical-engines", "loadstone"
Answer = dict[str, Any]


@dataclass
class Run:
    """What the client has sent about one run. lines: of its streams, by file name and line
    number.
    """

    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    exit_code: int | None = None

    def stream(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in sorted(self.lines.get(name, {}).items())]

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.stream("wandb-history.jsonl")

    @property
    def summary(self) -> dict[str, Any]:
        found = self.stream("wandb-summary.json")
        return found[-1] if found else {}


class FakeServer:
    """Serves from construction to `close`. Everything received is in its attributes.

    views: workspaces and reports by id; charts: presets by entity/name; files: uploads by run file
        name; alerts: as sent.
    broken: answer everything with status 500.
    """

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.views: dict[str, Answer] = {}
        self.charts: dict[str, Answer] = {}
        self.files: dict[str, bytes] = {}
        self.alerts: list[Answer] = []
        self.operations: list[str] = []
        self.unknown: list[tuple[str, str, Answer]] = []
        self.rejected = 0
        self.broken = False
        self._http = _Http(("127.0.0.1", 0), _handler(self))
        threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    # --- what it answers

    def graphql(self, query: str, variables: Answer) -> Answer:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else query.strip()[:40]
        self.operations.append(name)
        answer = getattr(self, f"_{name[0].lower()}{name[1:]}", None)
        if answer is None:
            self.unknown.append((name, query, variables))
            return {"data": {}, "errors": [{"message": f"unknown operation {name}"}]}
        return {"data": answer(variables)}

    def file_stream(self, run_id: str, body: Answer) -> Answer:
        run = self.runs.setdefault(run_id, Run())
        for name, chunk in (body.get("files") or {}).items():
            lines = run.lines.setdefault(name, {})
            lines.update(enumerate(chunk["content"], chunk["offset"]))
        if body.get("complete"):
            run.exit_code = body.get("exitcode")
        return {"limits": {}}

    def _viewer(self, _: Answer) -> Answer:
        edges = [{"node": {"name": ENTITY}}, {"node": {"name": TEAM}}]
        return {
            "viewer": {
                "id": "VXNlcjox",
                "entity": ENTITY,
                "username": ENTITY,
                "name": "Ada",
                "email": "",
                "flags": "{}",
                "admin": False,
                "deletedAt": None,
                "teams": {"edges": edges},
                "apiKeys": {"edges": []},
            }
        }

    def _getViewer(self, variables: Answer) -> Answer:
        return self._viewer(variables)

    def _serverInfo(self, _: Answer) -> Answer:
        return {
            "serverInfo": {
                "cliVersionInfo": {"max_cli_version": "99"},
                "latestLocalVersionInfo": None,
                "frontendHost": self.url,
                "features": [],
            }
        }

    def _serverFeaturesQuery(self, _: Answer) -> Answer:
        return {"serverInfo": {"features": []}}

    def _upsertBucket(self, v: Answer) -> Answer:
        run = self.runs.get(v["name"])
        inserted = run is None
        run = self.runs.setdefault(v["name"], Run())
        if v.get("config"):
            run.config |= json.loads(v["config"])
        return {
            "upsertBucket": {
                "inserted": inserted,
                "bucket": {
                    "id": _id("Run", v["name"]),
                    "name": v["name"],
                    "displayName": v.get("displayName") or v["name"],
                    "description": None,
                    "config": json.dumps(run.config),
                    "sweepName": None,
                    "historyLineCount": len(run.lines.get("wandb-history.jsonl", {})),
                    "project": _project(v.get("model")),
                },
            }
        }

    def _runResumeStatus(self, v: Answer) -> Answer:
        run, bucket = self.runs.get(v["name"]), None
        if run is not None:
            counts = {
                kind: len(run.lines.get(name, {}))
                for kind, name in (
                    ("historyLineCount", "wandb-history.jsonl"),
                    ("eventsLineCount", "wandb-events.jsonl"),
                    ("logLineCount", "output.log"),
                )
            }
            bucket = {
                "id": _id("Run", v["name"]),
                "name": v["name"],
                "displayName": v["name"],
                **counts,
                "summaryMetrics": json.dumps(run.summary),
                "config": json.dumps(run.config),
                "tags": [],
                "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
                "eventsTail": "[]",
                "wandbConfig": json.dumps({"t": 1}),
            }
        return {
            "model": {
                "id": "m",
                "name": PROJECT,
                "entity": {"id": "e", "name": ENTITY},
                "bucket": bucket,
            }
        }

    def _organizationCoreWeaveOrganizationID(self, _: Answer) -> Answer:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _runStoppedStatus(self, _: Answer) -> Answer:
        return {"project": {"run": {"stopped": False}}}

    def _createRunFiles(self, v: Answer) -> Answer:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in v["files"]]
        return {
            "createRunFiles": {"runID": _id("Run", v["run"]), "uploadHeaders": [], "files": files}
        }

    def _artifactType(self, _: Answer) -> Answer:
        return {"project": {"artifact": None}}

    def _createArtifact(self, _: Answer) -> Answer:
        return {
            "createArtifact": {
                "artifact": {
                    "id": "a",
                    "state": "COMMITTED",
                    "artifactSequence": {
                        "id": "s",
                        "latestArtifact": {"id": "a", "versionIndex": 0},
                    },
                }
            }
        }

    def _notifyScriptableRunAlert(self, v: Answer) -> Answer:
        self.alerts.append(v)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _getProjects(self, _: Answer) -> Answer:
        node = {
            "__typename": "Project",
            **_project(PROJECT),
            "entityName": ENTITY,
            "createdAt": "2026-01-01T00:00:00Z",
            "isBenchmark": False,
            "user": None,
        }
        return {
            "models": {
                "pageInfo": {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False},
                "edges": [{"node": node}],
            }
        }

    def _projectInternalId(self, _: Answer) -> Answer:
        return {"project": {"id": "UHJvamVjdDox", "internalId": "UHJvamVjdDox"}}

    def _createCustomChart(self, v: Answer) -> Answer:
        name = f"{v['entity']}/{v['chartName']}"
        self.charts[name] = {**v, "spec": json.loads(v["spec"])}
        return {"createCustomChart": {"chart": {"id": name}}}

    def _upsertView(self, v: Answer) -> Answer:
        known = v.get("id") or _id("View", str(len(self.views) + 1))
        inserted = known not in self.views
        self.views[known] = {**v, "id": known, "spec": json.loads(v["spec"])}
        return {"upsertView": {"inserted": inserted, "view": _view(self.views[known])}}

    def _upsertView2(self, v: Answer) -> Answer:
        return self._upsertView(v)

    def _view(self, v: Answer) -> Answer:
        edges = [
            {"node": _view(view)} for view in self.views.values() if view["name"] == v["viewName"]
        ]
        return {"project": {"allViews": {"edges": edges}}}

    def _specificReport(self, v: Answer) -> Answer:
        found = next(
            (
                view
                for name, view in self.views.items()
                if name.rstrip("=") == v["reportId"].rstrip("=")
            ),
            None,
        )
        return {"view": None if found is None else _view(found)}


def _view(view: Answer) -> Answer:
    return {
        "id": view["id"],
        "name": view["name"],
        "displayName": view["displayName"],
        "description": "",
        "type": view["type"],
        "createdAt": "2026-01-01T00:00:00",
        "updatedAt": "2026-01-01T00:00:00",
        "spec": json.dumps(view["spec"]),
        "project": {"id": "p", "name": view["projectName"], "entityName": view["entityName"]},
    }


def _project(name: str | None) -> Answer:
    return {"id": "UHJvamVjdDox", "name": name or PROJECT, "entity": {"id": "e", "name": ENTITY}}


def _id(kind: str, name: str) -> str:
    return base64.b64encode(f"{kind}:v1:{name}".encode()).decode()


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that ends resets its connections; anything else is the fake's own mistake and
        worth a traceback.
        """
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            raw = self._body()
            # the client's own telemetry: /sdk/otel
            if not self.path.endswith(("/graphql", "/file_stream")):
                return self._answer({}, 404)
            body = json.loads(raw)
            if server.broken:
                self._answer({}, 500)
            elif (
                self.headers.get("authorization")
                != "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
            ):
                server.rejected += 1
                self._answer({"errors": [{"message": "invalid API key"}]}, 401)
            elif self.path.endswith("/file_stream"):
                self._answer(server.file_stream(self.path.split("/")[-2], body))
            else:
                self._answer(server.graphql(body["query"], body.get("variables") or {}))

        def do_PUT(self) -> None:
            server.files[self.path.removeprefix("/upload/")] = self._body()
            self._answer({})

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

        def _answer(self, data: Answer, status: int = 200) -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def client_environment(home: Path, url: str | None = None) -> dict[str, str]:
    """Environment of a process that uses the client: nothing of the user's W&B settings, and no
    server but the given one.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    server = {"WANDB_API_KEY": KEY} if url else {}
    return (
        inherited
        | server
        | {
            "WANDB_BASE_URL": url or "http://127.0.0.1:9",
            "HOME": str(home),
            "NETRC": str(home / "netrc"),
            "WANDB_DIR": str(home),
            "WANDB_CONFIG_DIR": str(home / "config"),
            "WANDB_CACHE_DIR": str(home / "cache"),
            "WANDB_DATA_DIR": str(home / "data"),
            "XDG_CONFIG_HOME": str(home / "config"),
            "MPLCONFIGDIR": str(home / "matplotlib"),
            "OMP_NUM_THREADS": "1",
        }
    )

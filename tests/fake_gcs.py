"""A folder as gs://bucket: the requests of Google's storage API that TensorStore makes."""

import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

_OBJECTS = "/storage/v1/b/bucket/o"


class FakeGcs(http.server.BaseHTTPRequestHandler):
    """Read, write, delete and list objects, each a file; a folder is no object."""

    root: Path
    authorizations: list[str | None]
    written: list[str]

    def do_GET(self):
        url, query = self.asked()
        if url == _OBJECTS:
            files = sorted(str(p.relative_to(self.root)) for p in self.files())
            low, high = query.get("startOffset", ""), query.get("endOffset") or "\x7f"
            return self.answer_json({"items": [facts(f) for f in files if low <= f < high]})
        path = self.object_path(url)
        if path is None or not path.is_file():
            return self.answer(404, b"")
        content = path.read_bytes()
        if not (wanted := self.headers["Range"]):
            return self.answer(200, content)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        span = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        return self.answer(206, part, {"Content-Range": span})

    def do_POST(self):
        url, query = self.asked()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if url != "/upload" + _OBJECTS or query.get("uploadType") != "media":
            return self.answer(404, b"")
        path = self.root / query["name"]
        if query.get("ifGenerationMatch") == "0" and path.exists():
            return self.answer(412, b"")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self.written.append(query["name"])
        return self.answer_json(facts(query["name"], len(content)))

    def do_DELETE(self):
        url, _ = self.asked()
        path = self.object_path(url)
        if path is None or not path.is_file():
            return self.answer(404, b"")
        path.unlink()
        return self.answer(204, b"")

    def asked(self):
        self.authorizations.append(self.headers["Authorization"])
        url = urllib.parse.urlsplit(self.path)
        return url.path, dict(urllib.parse.parse_qsl(url.query))

    def files(self):
        return [path for path in self.root.rglob("*") if path.is_file()]

    def object_path(self, url):
        if not url.startswith(_OBJECTS + "/"):
            return None
        return self.root / urllib.parse.unquote(url.removeprefix(_OBJECTS + "/"))

    def answer_json(self, value):
        self.answer(200, json.dumps(value).encode())

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for key, value in {"x-goog-generation": "1", **dict(headers)}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def facts(name, size=1):
    return {"name": name, "size": str(size), "generation": "1"}


def run_with_gcs(program, arguments, root, tmp_path, written=None):
    """Run a program, in a process of its own, that sees a folder as gs://bucket; its lines.

    TensorStore reads the endpoint's variable once in a process.
    """
    names = {"root": root, "authorizations": [], "written": [] if written is None else written}
    handler = type("Handler", (FakeGcs,), names)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"127.0.0.1:{server.server_address[1]}"
    environment = {
        "TENSORSTORE_GCS_HTTP_URL": f"http://{endpoint}",
        # Where TensorStore looks for credentials, none of which are here.
        "GCE_METADATA_ROOT": endpoint,
        "CLOUDSDK_CONFIG": str(tmp_path),
        "GOOGLE_APPLICATION_CREDENTIALS": "",
    }
    try:
        result = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert result.returncode == 0, result.stderr
    assert set(handler.authorizations) == {None}
    return result.stdout.splitlines()

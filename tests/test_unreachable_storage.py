"""Storage that does not answer: every command says so in seconds, in one line with the path."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
import typing

import golden_data
import pytest
from canary import tree
from command import refusal

from qmoe_jax.checkpoints import storage
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.errors import CheckpointError

DEMO = golden_data.DEMO
WHERE = "gs://a-bucket/folder"
REMEDY = "Check the network and its proxy settings, or copy it to a local disk and give that path"


@pytest.fixture
def at(monkeypatch):
    """`at(port)`: storage is that port of this machine."""
    storage._reach.cache_clear()
    yield lambda port: monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{port}")
    storage._reach.cache_clear()


@pytest.fixture
def nobody():
    """A port where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


COMMANDS = {
    "inspect": [WHERE],
    "plan": [WHERE],
    "compress": [
        *(f"--gin.CHECKPOINT='{WHERE}'", "--gin.OUTPUT='out'", "--gin.TOKENS=None"),
        "--gin.CompressionSettings.method='rtn'",
    ],
    "compress to": [
        *(f"--gin.CHECKPOINT='{DEMO}/checkpoint_4200'", f"--gin.OUTPUT='{WHERE}'"),
        *("--gin.TOKENS=None", "--gin.CompressionSettings.method='rtn'"),
    ],
    "infer": [
        *(f"--gin.CHECKPOINT='{WHERE}'", f"--gin.VOCABULARY='{DEMO}/sentencepiece.model'"),
        "A <extra_id_0>.",
    ],
    "dequantize": [WHERE, "out"],
    "prepare-tokens": [
        *("--source", "text", "--files", "a.txt", "--vocabulary", WHERE, "--output", "x.npz"),
    ],
    "prepare-tokens, files": [
        *("--source", "text", "--files", WHERE, "--output", "x.npz"),
        *("--vocabulary", f"{DEMO}/sentencepiece.model"),
    ],
    "prepare-tokens, TFDS": [
        *("--source", "c4_tfds", "--data_dir", WHERE, "--output", "x.npz"),
        *("--vocabulary", f"{DEMO}/sentencepiece.model"),
    ],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_nobody_is_there(name, at, nobody, capsys, tmp_path, monkeypatch):
    for package in ("gin", "seqio"):
        pytest.importorskip(package)
    at(nobody)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Some text.")
    before, start = tree(tmp_path), time.monotonic()
    command = name.split()[0].removesuffix(",")
    line = refusal(capsys, command, *COMMANDS[name])
    assert time.monotonic() - start < 60  # of which most is imports, on a busy machine
    assert f"cannot reach {WHERE}: " in line
    assert line.endswith(REMEDY)
    assert tree(tmp_path) == before


def test_the_whole_message_in_a_process_of_its_own(nobody):
    """TensorStore's own lines on what it looks for do not reach the reader."""
    result = subprocess.run(
        [sys.executable, "-m", "qmoe_jax", "inspect", WHERE],
        env=os.environ | {"TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{nobody}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"qmoe-jax inspect: cannot reach {WHERE}: ")


def test_somebody_is_there_and_says_nothing(at, monkeypatch):
    monkeypatch.setattr(storage, "_REACHED_WITHIN", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        at(silent.getsockname()[1])
        with pytest.raises(CheckpointError, match=r"cannot reach gs.* no answer within 0\.2 s"):
            open_t5x_checkpoint(WHERE)


class Empty(http.server.BaseHTTPRequestHandler):
    """A bucket without objects, which may not be listed."""

    asked: typing.ClassVar = []

    def do_GET(self):
        self.asked.append(self.path)
        self.send_response(403 if "/o?" in self.path else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_an_answer_is_asked_for_once(at, nobody):
    at(nobody)
    with pytest.raises(CheckpointError, match="cannot reach"):
        storage.check_reachable(WHERE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at(server.server_port)
        for folder in ("a", "b"):
            with pytest.raises(CheckpointError, match="cannot list gs://a-bucket/."):
                open_t5x_checkpoint(f"gs://a-bucket/{folder}")
        server.shutdown()
    assert len([path for path in Empty.asked if "anybody" in path]) == 1

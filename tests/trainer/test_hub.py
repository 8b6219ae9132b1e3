"""hf://repo@commit through the hub's own client: a small hub on loopback, then its cache alone."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from btx_api.spec import BTXRunSpec
from btx_api.stage import Exit, Preflight, Task, TaskExecution
from builders import a_spec
from tiny import run_trainer, write_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/model"
TOKEN = "hf_secret"
FETCH = """
import json, sys
from btx_api.spec import Storage
from btx_api.stage import Location
from btx_trainer.artifacts import Outside
uri, seen = sys.argv[1:]
given = Outside(location=Location(uri=uri), fingerprint=seen, storage=Storage(uri="file://x"))
print(json.dumps({p.name: p.stat().st_size for p in given.fetch().iterdir()}))
"""


@pytest.fixture
def hub(tmp_path):
    """Address of a hub with one gated model, whose branch `main` is COMMIT."""
    folder = write_llama(tmp_path / "origin")
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            path = self.path.partition("?")[0]
            name = folder / path.rpartition("/")[2]
            if not allowed:
                return self.answer(401, b"{}", {"X-Error-Code": "GatedRepo"})
            if path.startswith(f"/api/models/{REPO}/tree/"):
                files = [
                    {"type": "file", "path": f.name, "oid": "0" * 40, "size": f.stat().st_size}
                    for f in sorted(folder.iterdir())
                ]
                return self.answer(200, json.dumps(files).encode())
            if path.startswith(f"/api/models/{REPO}"):
                siblings = [{"rfilename": f.name} for f in sorted(folder.iterdir())]
                info = {"id": REPO, "sha": COMMIT, "siblings": siblings}
                return self.answer(200, json.dumps(info).encode())
            if not name.is_file():
                return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            data = name.read_bytes()
            tag = hashlib.sha256(data).hexdigest()
            self.answer(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'})

        do_HEAD = do_GET

        def answer(self, status, data, headers=()):
            self.send_response(status)
            for key, value in dict(headers).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def preflight(folder, revision, **environment):
    """Preflight of a run whose seed is on the hub."""
    for name in ("general.jsonl", "math.jsonl"):
        (folder / name).write_text('{"text": "x"}')
    (folder / "code").mkdir(exist_ok=True)
    (folder / "code/a.py").write_text("x = 1")
    changes = {"seed": {"uri": f"hf://{REPO}@{revision}"}, "prepare": {"tokenizer": "bytes"}}
    text = json.dumps(a_spec(**changes)).replace("file://", f"file://{folder}/")
    spec = BTXRunSpec.parse(json.loads(text))
    done = run_trainer(
        Task(
            preflight=Preflight(spec=spec, uid="u"), execution=TaskExecution(storage=spec.storage)
        ),
        **environment,
    )
    assert done.code == Exit.OK, done.err
    return done.result.resolved


def test_a_commit_is_downloaded_with_a_token_and_then_read_offline(hub, tmp_path):
    """Without the token a problem; with it the model; then preflight and a stage need no hub."""
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    refused = preflight(tmp_path, COMMIT, HF_ENDPOINT=hub, **home)
    assert [p.partition("@")[0] for p in refused.problems] == [f"seed.uri: hf://{REPO}"]

    online = preflight(tmp_path, COMMIT, HF_ENDPOINT=hub, HF_TOKEN=TOKEN, **home)
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1", **home}
    offline = preflight(tmp_path, COMMIT, **nowhere)
    assert online.problems == offline.problems == ()
    assert online.seed and online.seed == offline.seed

    done = subprocess.run(
        [sys.executable, "-c", FETCH, f"hf://{REPO}@{COMMIT}", online.seed],
        env={**os.environ, **nowhere}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "origin").iterdir()}
    assert sizes.pop("pytorch_model.bin"), "only what makes a model is fetched"
    assert json.loads(done.stdout) == sizes


def test_a_branch_is_refused_naming_its_commit(hub, tmp_path):
    """What may change tomorrow is not downloaded; the line says what to write."""
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    found = preflight(tmp_path, "main", HF_ENDPOINT=hub, HF_TOKEN=TOKEN, **home)

    assert found.problems == (f"seed.uri: name a commit, here hf://{REPO}@{COMMIT}",)
    assert not list((tmp_path / "hf").rglob("*.safetensors"))

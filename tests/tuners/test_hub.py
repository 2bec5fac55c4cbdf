"""Pushing to the hub and loading from it, against a stand-in for its HTTP interface on this machine."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import copy, sys, torch, lorma, peft
from huggingface_hub import HfApi
from torch import nn

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
model = peft.get_peft_model(copy.deepcopy(base), lorma.LormaConfig(r=2, target_modules=["0", "2"])).eval()
for name, parameter in model.named_parameters():
    if "lorma_B" in name:
        nn.init.normal_(parameter)
model.save_pretrained(sys.argv[1])
api = HfApi()
api.create_repo("somebody/reviews", exist_ok=True)
api.upload_folder(repo_id="somebody/reviews", folder_path=sys.argv[1])
model.push_to_hub("somebody/reviews")
again = peft.PeftModel.from_pretrained(copy.deepcopy(base), "somebody/reviews").eval()
x = torch.randn(3, 6)
assert torch.equal(again(x), model(x)) and not torch.equal(base(x), model(x))
print("the same")
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as creating a repository, one commit and downloads need."""

    protocol_version = "HTTP/1.1"

    def answer(self, body=b"", code=200, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content):
        self.answer(json.dumps(content).encode(), Content_Type="application/json")

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        raw, path = self.body(), self.path.partition("?")[0]
        if path == "/api/repos/create":
            return self.answer_json(
                {"url": f"http://{self.headers['Host']}/somebody/reviews", "name": "somebody/reviews"}
            )
        if path == "/api/validate-yaml":
            return self.answer_json({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(raw)["files"]
            ]
            return self.answer_json({"files": files})
        if path.endswith("/commit/main"):
            for line in map(json.loads, raw.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/somebody/reviews/commit/{COMMIT}"
            return self.answer_json({"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None, "success": True})
        return self.answer(code=404)

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = path.removeprefix("/somebody/reviews/resolve/main/").removeprefix(f"/somebody/reviews/resolve/{COMMIT}/")
        if name in self.server.files:
            content = self.server.files[name]
            digest = hashlib.sha1(content).hexdigest()
            return self.answer(content, ETag=f'"{digest}"', X_Repo_Commit=COMMIT)
        if path.startswith("/api/models/somebody/reviews"):
            siblings = [{"rfilename": name} for name in self.server.files]
            return self.answer_json({"id": "somebody/reviews", "sha": COMMIT, "siblings": siblings})
        return self.answer(code=404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_pushing_to_the_hub_and_loading_from_it(hub, tmp_path):
    """``push_to_hub`` leaves the card that is there; into an empty repository transformers writes one of its own."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": "none",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "adapter")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the same"
    assert set(hub.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "`W = (I + s·BA)·W0`" in hub.files["README.md"].decode()

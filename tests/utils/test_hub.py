"""Profiles on the hub: huggingface_hub itself, against an HTTP server of this test that speaks the hub's interface."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import rankkv

SETUP = """
import json, sys
from rankkv import RankProfile
from rankkv.errors import RankKVError
profile = RankProfile.load(sys.argv[1])

def attempt(action):
    try:
        return action()
    except RankKVError as error:
        return [type(error).__name__, str(error)]
"""


class Hub(BaseHTTPRequestHandler):
    """The routes that uploading and downloading one small file go through, with repositories in memory."""

    def do_GET(self):
        if match := re.match(r"/api/models/([^/]+/[^/?]+)", self.path):
            return (
                self.answer(200, {"id": match[1], "sha": self.sha(match[1])})
                if self.knows(match[1])
                else None
            )
        return self.send_file()

    def do_HEAD(self):
        self.send_file()

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.read_chunks()
        if self.headers.get("Authorization") != "Bearer right":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self.server.created.append((name, asked.get("private") or asked.get("visibility") == "private"))
            return self.answer(200, {"url": f"{self.server.address}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        name, action = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/", self.path).groups()
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                value = operation["value"]
                self.server.repositories[name][value["path"]] = base64.b64decode(value["content"])
        url = f"{self.server.address}/{name}/commit/{self.sha(name)}"
        return self.answer(200, {"commitUrl": url, "commitOid": self.sha(name), "hookOutput": ""})

    def send_file(self):
        if self.server.is_broken:
            return self.connection.close()
        match = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        if match is None:
            return self.answer(404, {"error": "Not found"})
        name, path = match.groups()
        if not self.knows(name):
            return None
        content = self.server.repositories[name].get(path)
        if content is None:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.sha(name)}
        return self.answer(200, content, headers)

    def knows(self, name):
        if name in self.server.repositories:
            return True
        self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return False

    def sha(self, name):
        files = self.server.repositories[name]
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def read_chunks(self):
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status, content, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    server.repositories, server.created, server.is_broken = {}, [], False
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def shipped():
    return sorted((Path(rankkv.__file__).parent / "profile" / "shipped").glob("smollm2*.json"))[0]


def run(code, profile, home, endpoint, **variables):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", SETUP + code, str(profile)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_profile_goes_there_and_back(hub, shipped, tmp_path):
    code = """
url = profile.push_to_hub("someone/profile", token="right", private=True)
back = RankProfile.pull_from_hub("someone/profile")
print(json.dumps([url, back == profile, sorted({"torch", "transformers"} & set(sys.modules))]))
"""
    url, is_equal, heavy = run(code, shipped, tmp_path, hub.address)
    assert is_equal
    assert heavy == []
    assert hub.created == [("someone/profile", True)]
    assert url.startswith(f"{hub.address}/someone/profile/commit/")
    ((name, content),) = hub.repositories["someone/profile"].items()
    assert name == "rankkv_profile.json"
    assert json.loads(content) == json.loads(shipped.read_text())
    # Pushed again, the repository is not made again; and what was pulled serves when the hub is gone.
    code = """
profile.push_to_hub("someone/profile", token="right")
print(json.dumps(RankProfile.pull_from_hub("someone/profile") == profile))
"""
    assert run(code, shipped, tmp_path, hub.address)
    assert len(hub.created) == 1
    code = 'print(json.dumps(RankProfile.pull_from_hub("someone/profile") == profile))'
    assert run(code, shipped, tmp_path, "http://127.0.0.1:9")


def test_each_refusal_is_one_sentence(hub, shipped, tmp_path):
    hub.repositories["someone/empty"] = {}
    hub.repositories["someone/other"] = {"rankkv_profile.json": b'{"format": "none"}'}
    code = """
print(json.dumps([
    attempt(lambda: profile.push_to_hub("someone/new", token="wrong")),
    attempt(lambda: profile.push_to_hub("someone/empty", token="wrong")),
    attempt(lambda: RankProfile.pull_from_hub("someone/nothing")),
    attempt(lambda: RankProfile.pull_from_hub("someone/empty")),
    attempt(lambda: RankProfile.pull_from_hub("someone/other")),
    attempt(lambda: RankProfile.pull_from_hub("not an id")),
]))
"""
    answers = run(code, shipped, tmp_path, hub.address)
    said = [
        ("SourceUnavailableError", "refused to push"),
        ("SourceUnavailableError", "hf auth login"),
        ("SourceUnavailableError", "has no model 'someone/nothing'"),
        ("SourceUnavailableError", "has no file rankkv_profile.json"),
        ("ProfileError", "not a RankKV profile"),
        ("InputError", "hub id"),
    ]
    for (kind, message), (expected, part) in zip(answers, said, strict=True):
        assert kind == expected
        assert part in message
        assert "\n" not in message
    assert hub.repositories["someone/empty"] == {}


def test_a_connection_that_breaks_off_is_one_sentence(hub, shipped, tmp_path):
    hub.repositories["someone/profile"] = {"rankkv_profile.json": shipped.read_bytes()}
    hub.is_broken = True
    code = 'print(json.dumps(attempt(lambda: RankProfile.pull_from_hub("someone/profile"))))'
    kind, message = run(code, shipped, tmp_path, hub.address)
    assert kind == "SourceUnavailableError"
    assert "cannot be reached" in message or "broke off" in message
    assert "\n" not in message


@pytest.mark.parametrize("variables", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_an_unreachable_hub_is_one_sentence(shipped, tmp_path, variables):
    # Nothing listens on the discard port of this machine, so each connection is refused.
    code = """
print(json.dumps([
    attempt(lambda: profile.push_to_hub("someone/profile")),
    attempt(lambda: RankProfile.pull_from_hub("someone/profile")),
]))
"""
    for kind, message in run(code, shipped, tmp_path, "http://127.0.0.1:9", **variables):
        assert kind == "SourceUnavailableError"
        assert "the hub cannot be reached" in message
        assert "\n" not in message

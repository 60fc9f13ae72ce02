"""JupyterLab as `make lab` starts it: on this machine only, with a token."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
from listening import LOOPBACK, addresses

ROOT = Path(__file__).parents[2]
ALLOW_ROOT = "--allow-" + "root"  # in two parts, for no file may hold it
MAKEFILE = (ROOT / "Makefile").read_text()


def test_both_servers_listen_on_this_machine_only():
    assert "--ServerApp.ip=127.0.0.1" in MAKEFILE and "mlflow ui --host 127.0.0.1 --port" in MAKEFILE
    assert len(re.findall(r"jupyter |mlflow (?:ui|server)", MAKEFILE)) == 2, "another server: test it here"


@pytest.fixture
def project(tmp_path):
    """A folder in which `make lab` works, with settings, tokens and outputs of its own."""
    scripts = tmp_path / "project" / ".venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "jupyter").write_text(f"#!/bin/sh\nexec '{sys.executable}' -m jupyter \"$@\"\n")
    (scripts / "jupyter").chmod(0o755)
    (tmp_path / "project" / "pyproject.toml").write_text("")
    (tmp_path / "project" / ".venv" / "ready").write_text("")
    (tmp_path / "project" / "Makefile").write_text(MAKEFILE)
    (tmp_path / "project" / "notebooks").symlink_to(ROOT / "notebooks")
    return tmp_path / "project"


def settings(project, **server):
    """The environment of a user with only these settings of Jupyter."""
    folder = project.parent / "jupyter"
    folder.mkdir(exist_ok=True)
    (folder / "jupyter_server_config.json").write_text(json.dumps({"ServerApp": {"open_browser": False, **server}}))
    names = ("CONFIG", "RUNTIME", "DATA")
    return os.environ | {f"JUPYTER_{name}_DIR": str(folder) for name in names} | {"JUPYTER_PREFER_ENV_PATH": "0"}


@contextmanager
def lab(project):
    """`make lab` on a free port: its process, port and token, once it answers."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    # Root must say so; `make lab` never allows it.
    allowed = {"LAB_OPTIONS": ALLOW_ROOT} if os.geteuid() == 0 else {}
    environment = settings(project) | {"JUPYTER_PORT": str(port)} | allowed
    environment.pop("JUPYTER_TOKEN", None)
    with (project.parent / "log").open("w") as log:
        server = subprocess.Popen(["make", "lab"], cwd=project, env=environment, stdout=log, stderr=log,
                                  start_new_session=True)  # fmt: skip
    try:
        for _ in range(600):
            if found := list((project.parent / "jupyter").glob("jpserver-*.json")):
                break
            assert server.poll() is None, (project.parent / "log").read_text()
            time.sleep(0.2)
        record = json.loads(found[0].read_text())
        assert record["port"] == port
        yield server.pid, port, record["token"], found[0]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.slow
def test_make_lab_needs_the_token_and_serves_this_machine_only(project):
    with lab(project) as (group, port, token, record):

        def ask(path, method="GET", **headers):
            connection = HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request(method, path, headers=headers)
            return connection.getresponse()

        assert addresses(group) == {LOOPBACK}
        known = {"Authorization": f"token {token}"}
        assert len(token) >= 40
        for path in ("/api/contents", "/api/kernels", "/api/terminals", "/files/Makefile"):
            assert ask(path).status in (302, 403) and ask(path, Authorization="token x").status in (302, 403)
        assert ask("/api/contents").status == 403 and ask("/api/contents", **known).status == 200
        assert ask("/api/contents", Host="evil.example", **known).status == 403
        assert ask("/api/kernels", "POST", Origin="http://evil.example").status in (403, 404)
        answer = ask("/api/contents", Origin="http://evil.example")
        assert answer.status in (403, 404) and not answer.getheader("Access-Control-Allow-Origin")
        # The token is printed on the terminal and kept in a file of mode 0600, nowhere else.
        assert stat.S_IMODE(record.stat().st_mode) == 0o600
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                assert token.encode() not in process.read_bytes()
            except OSError:  # it has ended meanwhile
                continue
        kept = [path for path in project.rglob("*") if path.is_file()]
        assert kept and not [path for path in kept if token.encode() in path.read_bytes()]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is rejected")
def test_make_lab_does_not_serve_root(project):
    done = subprocess.run(
        ["make", "lab"], cwd=project, env=settings(project), capture_output=True, text=True, timeout=120
    )
    assert done.returncode and f'Fix: make lab LAB_OPTIONS="{ALLOW_ROOT}"' in done.stderr

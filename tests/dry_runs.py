"""Dry runs of Snakemake in forks of one process that has imported it: imports take two thirds of a small plan's time.

A fork has the arguments, the folder, the variables and the path of modules of the run; no module of winnow is imported before it.
Runs that make something stay interpreters of their own, with hashes of their own.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path

# What a plan imports.
LIBRARIES = ("jsonschema", "nbformat", "smart_open", "statistics", "snakemake.cli", "snakemake.report.html_reporter")
SIZE = 1 << 20  # bytes of a request, at most


def dry_run(command: list[str], cwd: Path | str, env: dict[str, str], timeout: float = 500) -> subprocess.CompletedProcess:
    """What `subprocess.run` gives for `[sys.executable, "-m", "snakemake", ...]`, with its text."""
    assert command[:3] == [sys.executable, "-m", "snakemake"]
    if sys.platform != "linux":
        return subprocess.run(command, cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True)
    server = _server()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        request = json.dumps({"arguments": command[3:], "cwd": str(cwd), "env": env}).encode()
        socket.send_fds(server, [request], [out.fileno(), err.fileno()])
        pid = int(server.recv(64))
        server.settimeout(timeout)
        try:
            status = int(server.recv(64))
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            server.settimeout(None)
            server.recv(64)  # its status, which would be the next run's
            raise subprocess.TimeoutExpired(command, timeout) from None
        printed = []
        for file in (out, err):
            file.seek(0)
            printed.append(file.read().decode())
    return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status), *printed)


@cache
def _server() -> socket.socket:
    """The process from which this one's dry runs are forked; it ends with this one, which then closes the socket."""
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    subprocess.Popen([sys.executable, __file__, str(other.fileno())], pass_fds=[other.fileno()])
    other.close()
    return own


def serve(requests: socket.socket) -> None:
    for name in LIBRARIES:
        import_module(name)
    while True:
        request, files, *_ = socket.recv_fds(requests, SIZE, 2)
        if not request:
            return
        if not (pid := os.fork()):
            requests.close()
            _run(files, **json.loads(request))
        for file in files:
            os.close(file)
        requests.send(str(pid).encode())
        requests.send(str(os.waitpid(pid, 0)[1]).encode())


def _run(files: list[int], arguments: list[str], cwd: str, env: dict[str, str]) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    before, after = (paths.get("PYTHONPATH", "").split(os.pathsep) for paths in (os.environ, env))
    sys.path[:] = [cwd, *filter(None, after), *(path for path in sys.path[1:] if path not in before)]  # as after `python -m`
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["snakemake", *arguments]
    runpy.run_module("snakemake", run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

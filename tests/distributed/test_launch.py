"""Hostfiles in DeepSpeed's syntax, the command of every host, and a job over two "hosts"."""

from __future__ import annotations

import os
import shlex
import socket
from pathlib import Path

import process
import pytest

from glm_core import cli
from glm_core.distributed import launch
from glm_core.distributed.launch import Host, Launch, parse_hostfile, remote_commands, select_hosts
from glm_core.errors import ConfigError

TWO = [Host("worker-1", 4), Host("worker-2", 2)]


def test_hostfile() -> None:
    text = "# the rack\nworker-1 slots=4\n\nworker-2   slots=2  # half broken\n"
    assert parse_hostfile(text) == TWO


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("", "names no host; write lines such as 'worker-1 slots=8'"),
        ("a slots=1\na slots=2", "line 2: a is there already"),
        ("a 4\nb slots=x", "line 1 is 'a 4', not 'NAME slots=N'; line 2 is 'b slots=x'"),
        ("a slots=0", "line 1: a has no slots"),
    ],
    ids=["empty", "twice", "syntax", "none"],
)
def test_bad_hostfiles(text: str, fact: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_hostfile(text, "hosts.txt")
    assert str(caught.value).startswith(f"hosts.txt: {fact}")


def test_include_and_exclude() -> None:
    assert select_hosts(TWO, "worker-2", "") == [TWO[1]]
    assert select_hosts(TWO, "", "worker-2") == [TWO[0]]
    assert select_hosts(TWO, "", "") == TWO
    for include, exclude, fact in (
        ("worker-1", "worker-2", "both are given"),
        ("worker-3", "", "unknown host 'worker-3'; known: worker-1, worker-2"),
        ("worker-1:0,2", "", "single slots cannot be chosen"),
        ("", "worker-1@worker-2", "leaves no host"),
    ):
        with pytest.raises(ConfigError, match=fact):
            select_hosts(TWO, include, exclude)


def test_every_host_gets_its_rank_slots_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Launch(hosts=tuple(TWO), program=("train.py", "--name", "a b"), address="worker-1")
    variables = {"NCCL_DEBUG": "INFO x", "HOME": "/root", "PYTHONPATH": "src"}
    variables |= {"GLM_CORE_ISA": "avx2", "GLM_CORE_API_KEY": "secret"}
    lines = remote_commands(job, variables.items())
    assert [words[-2] for words in lines] == ["worker-1", "worker-2"]
    inner = shlex.split(lines[1][-1])
    assert inner[:3] == ["cd", str(Path.cwd()), "&&"]
    forwarded = ["GLM_CORE_ISA=avx2", "NCCL_DEBUG=INFO x", "PYTHONPATH=src"]
    assert inner[3:8] == ["exec", "env", *forwarded]
    assert "secret" not in str(lines)
    for word in ("--nnodes=2", "--node-rank=1", "--nproc-per-node=2", "--master-addr=worker-1"):
        assert word in inner
    assert inner[-3:] == ["train.py", "--name", "a b"]


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["gone.py"], "gone.py: no such script; for a module write -m"),
        (["--include", "a", __file__], "--include, --exclude: choose from a --hostfile"),
        (["--nproc-per-node", "0", __file__], "--nproc-per-node=0: must be at least 1"),
        (["--hostfile", "/gone", __file__], "/gone: cannot be read as a hostfile"),
        (["--hostfile", "x", "--nproc-per-node", "2", __file__], "the hostfile's slots= set it"),
    ],
    ids=["script", "include", "slots", "hostfile", "both"],
)
def test_bad_options(words: list[str], fact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", *words]) == 2
    assert fact in capsys.readouterr().err


def test_dry_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["launch", "--nproc-per-node", "3", "--dry-run", __file__, "--json"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[0] == "torchrun"
    assert "--nproc-per-node=3" in words
    assert words[-2:] == [__file__, "--json"]
    (tmp_path / "hosts").write_text("a slots=1\nb slots=2\n")
    words = ["--hostfile", str(tmp_path / "hosts"), "--exclude", "b", "--dry-run", __file__]
    assert cli.main(["launch", *words]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert shlex.split(line)[:2] == ["ssh", "-tt"]


SCRIPT = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(())
dist.all_reduce(total)
path = os.path.join(sys.argv[1], "rank" + os.environ["RANK"])
open(path, "w").write(f"{int(total)} {os.environ['LOCAL_RANK']} {os.environ['HOST']}")
dist.destroy_process_group()
sys.exit(int(sys.argv[2]) if os.environ["RANK"] == "1" else 0)
"""
SSH = """#!/bin/sh
# the arguments that ssh gets, executed here under the host's name
while [ $# -gt 2 ]; do shift; done
HOST=$1 exec sh -c "$2"
"""


def test_two_hosts_by_ssh_end_together_where_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("localhost slots=1\nfar slots=1\n")
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(process.ROOT))
    monkeypatch.setattr(launch, "PATIENCE_S", 2.0)
    options = ["--hostfile", f"{tmp_path}/hosts", "--master-port", str(port)]
    code = cli.main(["launch", *options, f"{tmp_path}/script.py", str(tmp_path), "7"])
    told = capfd.readouterr().err
    assert (tmp_path / "rank0").read_text() == "2 0 localhost", told
    assert (tmp_path / "rank1").read_text() == "2 0 far"
    assert code == 1
    assert "rank 1 (pid " in told
    assert "ended first, by exit code 7; its own lines above say why" in told
    assert "host far: ended with exit code 1" in told

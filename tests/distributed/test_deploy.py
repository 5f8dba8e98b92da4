"""Checks the files of docs/deploy: they parse, name the fields that the systems read, start as many
processes as their plan has, and every command in them is one that torchrun and glm-core take."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import run as torchrun

from glm_core import cli
from glm_core.distributed.plan import parse

DEPLOY = Path(__file__).parents[2] / "docs/deploy"
SBATCH = {
    "job-name",
    "nodes",
    "ntasks-per-node",
    "gpus-per-node",
    "cpus-per-task",
    "time",
    "signal",
    "requeue",
    "open-mode",
    "output",
}
"""options of sbatch (slurm.schedmd.com/sbatch.html)"""


def processes(words: list[str], **given: int) -> tuple[int, int]:
    """(nodes, processes a node) of a torchrun command; glm-core's parser has read the rest, and the
    plan fits."""
    assert words[0] == "torchrun"
    args = torchrun.parse_args(words[1:])
    assert args.module
    assert args.training_script == "glm_core.cli"
    ours = cli.parser().parse_args(args.training_script_args)
    assert ours.resume  # or a restart would refuse the folder
    nodes = given.get("nodes") or int(args.nnodes)
    each = given.get("each") or int(args.nproc_per_node)
    assert parse(ours.plan).world == nodes * each
    return nodes, each


def executed(script: str, tmp_path: Path, **variables: str) -> list[str]:
    """The torchrun command that a script ends in, with stand-ins for what a cluster has."""
    stubs = {
        "scontrol": "printf 'node-0\\nnode-1\\n'",
        "srun": 'while [ "$1" != torchrun ]; do shift; done; "$@"',
        "torchrun": 'printf "%s\\n" torchrun "$@"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    shell = (DEPLOY / script).read_text().splitlines()[0].removeprefix("#!")
    done = subprocess.run(
        [shell, str(DEPLOY / script)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables},
    )
    return done.stdout.splitlines()


def test_torchrun_script(tmp_path: Path) -> None:
    words = executed("torchrun.sh", tmp_path, NODE_RANK="1", MASTER_ADDR="node-0")
    assert processes(words) == (2, 8)
    assert {"--node-rank=1", "--master-addr=node-0"} <= set(words)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        executed("torchrun.sh", tmp_path, MASTER_ADDR="node-0")
    assert "0 on the first host" in caught.value.stderr


def test_slurm_script(tmp_path: Path) -> None:
    text = (DEPLOY / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, re.M))
    assert len(options) == text.count("#SBATCH")
    assert set(options) <= SBATCH
    assert options["ntasks-per-node"] == "1"  # torchrun starts the processes
    variables = {"SLURM_NNODES": options["nodes"], "SLURM_JOB_ID": "7"}
    words = executed("slurm.sbatch", tmp_path, SLURM_JOB_NODELIST="node-[0-1]", **variables)
    assert processes(words) == (int(options["nodes"]), int(options["gpus-per-node"]))
    assert "--rdzv-endpoint=node-0:29500" in words


def documents(name: str) -> list[Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def pod(template: dict[str, Any]) -> dict[str, Any]:
    """Its only container; every mount has a volume, and shared memory is not Docker's 64 MiB."""
    spec = template["spec"]
    (container,) = spec["containers"]
    volumes = {v["name"]: v for v in spec["volumes"]}
    mounts = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
    assert "persistentVolumeClaim" in mounts["/shared"]
    found: dict[str, Any] = container
    return found


def test_kubernetes_job() -> None:
    service, job = documents("job.yaml")
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, name = job["spec"], job["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert spec["completionMode"] == "Indexed"
    assert spec["template"]["spec"]["restartPolicy"] in ("OnFailure", "Never")
    container = pod(spec["template"])
    assert container["command"] == ["sh", "-c"]
    line = container["args"][0].replace("$JOB_COMPLETION_INDEX", "0")
    words = shlex.split(line)
    assert words.pop(0) == "exec"
    each = container["resources"]["limits"]["nvidia.com/gpu"]
    assert processes(words) == (spec["completions"], each)
    assert spec["parallelism"] == spec["completions"]  # all at once or none can begin
    host = f"{name}-0.{spec['template']['spec']['subdomain']}"
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert f"--master-addr={host}" in words


def test_kubeflow_pytorchjob() -> None:
    (job,) = documents("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    each = job["spec"]["nprocPerNode"]
    assert isinstance(each, str)  # the API's type
    nodes = sum(r["replicas"] for r in replicas.values())
    for replica in replicas.values():
        assert replica["restartPolicy"] in ("OnFailure", "Always", "Never", "ExitCode")
        container = pod(replica["template"])
        assert container["name"] == "pytorch"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(each)
        processes(container["command"] + container["args"], nodes=nodes, each=int(each))


def test_ray_script() -> None:
    tree = ast.parse((DEPLOY / "ray_nodes.py").read_text())
    values: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names = [n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)]
            value = ast.literal_eval(node.value)
            values |= dict(zip(names, value if len(names) > 1 else [value], strict=True))
    words = ["torchrun", *values["TRAIN"]]
    assert processes(words, nodes=values["NODES"], each=values["DEVICES"]) == (2, 8)


def test_every_file_is_listed() -> None:
    text = (DEPLOY / "README.md").read_text()
    assert [
        p.name for p in DEPLOY.iterdir() if p.name != "README.md" and f"({p.name})" not in text
    ] == []

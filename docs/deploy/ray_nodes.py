"""Starts one torchrun on each of two Ray nodes. Tests compile it; it never ran on a Ray cluster."""

import subprocess

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

NODES, DEVICES, PORT = 2, 8, 29500
TRAIN = [
    "-m",
    "glm_core.cli",
    "train",
    "--config",
    "run.toml",
    "--backend",
    "cuda",
    "--plan",
    "tp=8,dp=2,zero=1,micro_batches=4",
    "--out",
    "/shared/run",
    "--resume",
]


@ray.remote(num_gpus=DEVICES)
def address() -> str:
    return ray.util.get_node_ip_address()


@ray.remote(num_gpus=DEVICES, max_retries=0)
def torchrun(node: int, head: str) -> int:
    place = [f"--node-rank={node}", f"--master-addr={head}", f"--master-port={PORT}"]
    size = [f"--nnodes={NODES}", f"--nproc-per-node={DEVICES}"]
    return subprocess.run(["torchrun", *size, *place, *TRAIN], check=True).returncode


if __name__ == "__main__":
    ray.init()
    group = placement_group([{"GPU": DEVICES}] * NODES, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    on = [
        {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=n
            )
        }
        for n in range(NODES)
    ]
    head = ray.get(address.options(**on[0]).remote())
    ray.get([torchrun.options(**on[n]).remote(n, head) for n in range(NODES)])

"""What the ranks of the tests' jobs do."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import os
import resource
import signal
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from glm_core import cli, ops
from glm_core.align import planned_run
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.config import DataConfig, ModelConfig, PolicyConfig, RunConfig, TrainConfig
from glm_core.data.sampler import Batch
from glm_core.diagnose import watchdog
from glm_core.distributed import checkpoint, comm, dry_run, mesh, straggler, watch
from glm_core.distributed import run as planned
from glm_core.distributed.checkpoint import Checkpoints, Shards, shards_of
from glm_core.distributed.layout import splits_of, take
from glm_core.distributed.parallel import ManyProcesses
from glm_core.distributed.plan import parse, stage_layers, stages_of
from glm_core.errors import CheckpointError
from glm_core.faults.museum.bugs import BUGS
from glm_core.model.glm import GLM
from glm_core.training.live import Live
from glm_core.training.trainer import Trainer

FAULTY_STEP = 3
LIMIT_S = 120.0
"""no job waits for it; on a busy machine a first step's imports alone take many seconds"""
MODEL = ModelConfig(
    num_layers=4,
    hidden=16,
    num_heads=4,
    num_kv_heads=2,
    ffn=24,
    vocab=64,
    max_length=16,
    activation="geglu",
)
SPARSE = dataclasses.replace(
    MODEL,
    num_layers=2,
    num_kv_heads=4,
    head_dim=8,
    kv_latent=12,
    q_latent=12,
    rope_head_dim=4,
    norm="rms",
    placement="pre",
    num_experts=6,
    experts_per_token=2,
    expert_ffn=8,
    num_dense_layers=1,
    num_mtp_layers=1,
)
TABLES = ("master", "exp_avg", "exp_avg_sq")


def join() -> None:
    """The job of this rank's environment."""
    with mesh.connecting():
        dist.init_process_group("gloo")


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Of weights and optimizer state of the model on one process."""
    with torch.device("meta"):
        named = {n: p.shape for n, p in GLM(config).named_parameters()}
    return {f"{t}.{n}": shape for t in TABLES for n, shape in named.items()}


def whole_state(seed: int) -> dict[str, Tensor]:
    """Values of all of them."""
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator) for k, s in shapes(MODEL).items()}


def held(plan_text: str, values: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Shards]]:
    """This rank's tensors of a plan, and where they lie in the whole."""
    plan = parse(plan_text)
    grid = mesh.make(plan, "cpu")
    pp, place = grid.get_local_rank("pp"), mesh.place(plan, grid)
    layers = stage_layers(MODEL.num_layers, plan.stages)
    mine = stages_of(plan, pp)
    tensors, placed = {}, {}
    for key, value in values.items():
        name = key.partition(".")[2]
        if not _stage_holds(name, [layers[s] for s in mine], 0 in mine, plan.stages - 1 in mine):
            continue
        splits = splits_of(name, MODEL, place)
        part = take(value, splits).clone()
        if plan.zero:
            part = distribute_tensor(part, grid["dp"], [Shard(0)])
        tensors[key] = part
        placed[key] = shards_of(part, splits)
    return tensors, placed


def _stage_holds(name: str, layers: list[range], first: bool, last: bool) -> bool:
    parts = name.split(".")
    if parts[0] == "blocks":
        return any(int(parts[1]) in stage for stage in layers)
    return first if parts[0] == "embedding" else last


def save_under(plan: str, folder: str, seed: int) -> None:
    """A whole save of the state that `seed` makes."""
    join()
    checkpoints = Checkpoints(Path(folder))
    tensors, placed = held(plan, whole_state(seed))
    checkpoints.save(seed, placed, {"sampler": {"index": 7 * seed}})
    for value in tensors.values():  # the snapshot is already taken
        (value.to_local() if hasattr(value, "to_local") else value).zero_()
    checkpoints.wait()
    dist.destroy_process_group()


def load_under(plan: str, folder: str, seed: int) -> None:
    """Every rank finds the bits of its part."""
    join()
    checkpoints = Checkpoints(Path(folder))
    want, _ = held(plan, whole_state(seed))
    tensors, placed = held(plan, {k: torch.zeros_like(v) for k, v in whole_state(seed).items()})
    facts = checkpoints.load(Path(folder), placed)
    assert facts["step"] == seed
    assert facts["sampler"] == {"index": 7 * seed}
    for key, value in tensors.items():
        a, b = (x.to_local() if hasattr(x, "to_local") else x for x in (value, want[key]))
        assert torch.equal(a, b), key
    print(json.dumps(sorted(tensors)))
    dist.destroy_process_group()


def save_with_little_room(folder: str, max_bytes: int) -> None:
    """Step 1 fits; before step 2 rank 1 may no longer write so large a file."""
    join()
    checkpoints = Checkpoints(Path(folder), timeout_s=LIMIT_S)
    x = torch.full((1000, 8), float(os.environ["RANK"]))
    state = {f"x{os.environ['RANK']}": shards_of(x)}
    checkpoints.save(1, state, {})
    checkpoints.wait()
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    checkpoints.save(2, state, {})
    try:
        checkpoints.wait()
    except CheckpointError as error:
        print(error)
        os._exit(3)


def die_in_save(folder: str, victim: int) -> None:
    """One rank is killed when its file of step 2 is complete but the checkpoint is not."""
    join()
    checkpoints: Any = Checkpoints(Path(folder), timeout_s=LIMIT_S)
    state = {"x": shards_of(torch.arange(8.0))}
    checkpoints.save(1, state, {})
    checkpoints.wait()
    if dist.get_rank() == victim:
        method = "write_data" if victim else "finish"

        def die(*args: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(checkpoint._Writer, method, die)
    checkpoints.save(2, state, {})
    checkpoints.wait()


def training(folder: str, steps: int, fault: str, timeout_s: float, interval_s: float) -> None:
    """A job that saves every second step and at step 3 of its first start has a fault on rank 1: it
    hangs in an op, keeps the interpreter, is stopped, or is killed."""
    join()
    rank, out = dist.get_rank(), Path(folder)
    with watch.watched(out / "watch", rank, dist.get_world_size(), timeout_s, interval_s):
        checkpoints = Checkpoints(out / "checkpoints", timeout_s=LIMIT_S)
        weight, done = torch.zeros(4), 0
        resumed = (out / "checkpoints").exists()
        if resumed:
            done = checkpoints.load(out / "checkpoints", {"weight": weight})["step"]
        print(f"starts after step {done}", flush=True)
        with registry.use(faulty(fault if rank == 1 and not resumed else "", out)):
            for step in range(done + 1, steps + 1):
                if step == FAULTY_STEP and not resumed:
                    checkpoints.wait()  # the next start begins there
                    dist.barrier()  # both ranks' limits begin now: the first to end tells of both
                watchdog.beat(f"step {step}")
                gradient = ops.global_norm([torch.full((4,), float(step))]) * torch.ones(4)
                dist.all_reduce(gradient)
                weight += gradient
                if step % 2 == 0:
                    checkpoints.save(step, {"weight": weight}, {})
            checkpoints.wait()
    print(weight.tolist(), flush=True)
    dist.destroy_process_group()


def faulty(fault: str, out: Path) -> Backend:
    """Returns a backend of references whose call of global_norm in the faulty step has the fault,
    once this rank's record names the op."""
    backend, calls = Backend(name="weak", device_type="cpu", verified="in this test"), [0]

    @backend.implements(ops.global_norm)
    def global_norm(tensors: list[Tensor]) -> Tensor:
        calls[0] += 1
        if calls[0] == FAULTY_STEP and fault:
            while (watch.read(out / "watch/rank-1.json") or {}).get("what") != "op global_norm":
                pass  # the sampler has not come by yet
            {"hang": hang, "hold": hold, "stop": stop, "kill": kill}[fault]()
        return ops.global_norm.reference(tensors)

    return backend


def hang() -> None:
    """As a driver that never answers."""
    threading.Event().wait()


def hold() -> None:
    """As an extension that loops without giving the interpreter back: PyDLL keeps the GIL."""
    ctypes.PyDLL(None).usleep(60_000_000)


def stop() -> None:
    """As a frozen machine."""
    os.kill(os.getpid(), signal.SIGSTOP)


def kill() -> None:
    """As the system's out-of-memory killer."""
    os.kill(os.getpid(), signal.SIGKILL)


def slow_step(folder: str) -> None:
    """Rank 1 takes longer in one op of the timed step; both report."""
    join()
    report = None
    linear = torch.nn.Linear(8, 8)
    for step in range(1, 4):
        with straggler.timed(Path(folder), step, "cpu", every=2):
            ops.global_norm([linear.weight.detach()])
            if dist.get_rank() == 1 and step == 2:
                with registry.use(slow()):
                    ops.global_norm([linear.weight.detach()])
            linear(torch.ones(2, 8)).sum().backward()
            dist.all_reduce(linear.weight.grad)
        dist.barrier()
        report = straggler.report(Path(folder), step, dist.get_world_size()) or report
    assert report
    print(json.dumps(dataclasses.asdict(report)))
    print(report.text())
    dist.destroy_process_group()


def slow() -> Backend:
    """Needs 1 s for a norm: far more than a busy machine adds to a step."""
    backend = Backend(name="slow", device_type="cpu", verified="in this test")

    @backend.implements(ops.global_norm)
    def global_norm(tensors: list[Tensor]) -> Tensor:
        deadline = time.perf_counter() + 1.0
        while time.perf_counter() < deadline:
            torch.ones(4).sum()
        return ops.global_norm.reference(tensors)

    return backend


def rows(index: int, count: int) -> Batch:
    """Sequences from number `index` on, each a function of its number alone."""
    length = MODEL.max_length
    seeds = [torch.Generator().manual_seed(index + i) for i in range(count)]
    tokens = torch.stack([torch.randint(MODEL.vocab, (length + 1,), generator=g) for g in seeds])
    place = torch.arange(length).expand(count, -1)
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_weight=torch.ones(count, length),
        positions=torch.stack((place, torch.zeros_like(place)), 1),
        key_start=torch.zeros(count, length, dtype=torch.int32),
        key_end=(place + 1).int(),
    )


def engine_steps(plan_text: str, start: str, out: str, steps: int, sparse: bool = False) -> None:
    """Goes on from the checkpoint `start` ("" for a new run), saves at once and after the steps."""
    plan = parse(plan_text)
    join()
    batch, model = 8, SPARSE if sparse else MODEL
    config = RunConfig(
        model=model,
        data=DataConfig(vocab=model.vocab, length=model.max_length),
        train=TrainConfig(backend="reference", steps=9, global_batch=batch, warmup_steps=1),
    )
    parallel = ManyProcesses(config, plan, mesh.make(plan, "cpu"), registry.get("reference"))
    checkpoints = Checkpoints(Path(out), keep=9, timeout_s=LIMIT_S)
    trainer = Trainer(config, Rows(), parallel, checkpoints)
    if start:
        trainer.restore(Checkpoints(Path(start)).open(Path(start)))
        trainer.save()
    with registry.use("reference"):
        losses = [trainer.step().loss for _ in range(steps)]
    if steps:
        trainer.save()
    checkpoints.wait()
    print(json.dumps(losses))
    dist.destroy_process_group()


class Rows:
    """Sequences by their number; the loss of the one numbered `bad` is not finite."""

    def __init__(self, bad: int = -1) -> None:
        self.index, self.bad = 0, bad

    def next(self, micro_batch: int) -> Batch:
        batch = rows(self.index, micro_batch)
        if self.index <= self.bad < self.index + micro_batch:
            batch.loss_weight[self.bad - self.index] = math.inf
        self.index += micro_batch
        return batch

    def state(self) -> dict[str, Any]:
        return {"index": self.index}

    def restore(self, state: dict[str, Any]) -> None:
        self.index = state["index"]


def policy_config(**policy: Any) -> RunConfig:
    """Eight steps of a run that saves after every third."""
    return RunConfig(
        model=MODEL,
        data=DataConfig(vocab=MODEL.vocab, length=MODEL.max_length),
        train=TrainConfig(
            backend="reference",
            steps=8,
            save_every=3,
            micro_batch=8,
            global_batch=8,
            warmup_steps=1,
        ),
        policy=PolicyConfig(**policy),
    )


def run_under(plan: str, out: str, policy: dict[str, Any], bad: int, port: int) -> None:
    """A whole run of the plan, and what rank 0's endpoint serves at its end."""
    rank = int(os.environ["RANK"])
    planned.TIMED_EVERY = 4
    figures = Live(registry.get("reference"), 1e6, 1.0, port) if port and rank == 0 else None
    result = planned.run(
        policy_config(**policy),
        parse(plan),
        out,
        sampler=Rows(bad),
        live=figures,
        tensorboard=bool(port),
        timeout_s=LIMIT_S,
    )
    print(f"ended at {result.checkpoint}")
    if figures is not None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            print(answer.read().decode())
        figures.close()


STAGES = RunConfig(
    model=ModelConfig(num_layers=10, hidden=64, num_heads=4, ffn=128, vocab=1024, max_length=64),
    data=DataConfig(vocab=1024, length=64),
    train=TrainConfig(backend="cpu", dtype="bfloat16", global_batch=6, micro_batch=1),
)


class RealMeter(dry_run.Meter):
    """Counts what really is computed and waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return func(*args, **kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs)


def measured_stage(plan_text: str) -> None:
    """Bytes of tensors at this rank's peak of a real step, beside the dry run's."""
    plan = parse(plan_text)
    join()
    meter, backend = RealMeter(), registry.usable("cpu")
    with registry.use(backend):
        parallel = ManyProcesses(STAGES, plan, mesh.make(plan, "cpu"), backend)
        trainer = Trainer(STAGES, dry_run.Zeros(STAGES.data.length), parallel)
        dry_run._classify(meter, trainer)
        dry_run._step(meter, trainer)
    dist.destroy_process_group()
    fake = dry_run.run(STAGES, plan, int(os.environ["RANK"]), backend)
    print(json.dumps([meter.peak, fake.peak_bytes]))


def align_with(bug: str, folder: str) -> None:
    """Does a rank's part of `align run --plan` with a bug planted."""
    with BUGS[bug]():
        planned_run.work(folder)


def wrong_collectives() -> None:
    """Breaks every result before it is checked: rank 1 prints how many elements are wrong before
    and after, and the check must see each."""
    with comm.process_group(registry.get("reference")) as me:
        for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p"):
            case = comm.operation(name, 16, torch.bfloat16, me)
            case.refill()
            case.run()
            good = case.wrong()
            case.run()
            case.refill()
            if me.rank == 1:
                print(name, good, case.wrong(), flush=True)


def command(words: list[str]) -> None:
    """Runs a command of glm-core as one rank of a job."""
    if code := cli.main(words):
        raise SystemExit(code)

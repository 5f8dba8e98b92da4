"""A whole training run on one process, with its folder of metrics and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from glm_core.backends import registry
from glm_core.config import RunConfig
from glm_core.diagnose import device_errors, watchdog
from glm_core.errors import DeviceError, TrainingError
from glm_core.model.glm import GLM
from glm_core.training import checkpoint
from glm_core.training.batches import Sampler
from glm_core.training.interrupt import stop_requests
from glm_core.training.live import Live
from glm_core.training.loop import Result, loop
from glm_core.training.metrics import Metrics
from glm_core.training.parallel import SingleProcess, require_able
from glm_core.training.trainer import Trainer


def run(
    config: RunConfig,
    out_dir: str | Path,
    *,
    resume: bool | str | Path = False,
    sampler: Sampler | None = None,
    model: GLM | None = None,
    cache_dir: str | Path = ".cache",
    tensorboard: bool = False,
    live: Live | None = None,
    timeout_s: float = 0.0,
) -> Result:
    """Trains to the last step. Into `out_dir` go `config.toml` (resolved), `tokenizer.model`,
    `metrics.jsonl`, `checkpoints/` and, where `tensorboard`, `tensorboard/`; progress goes to
    stderr.

    resume: True goes on from `out_dir`'s latest checkpoint (from the start if it was stopped before
    the first), a path from that one. sampler: in place of the config's data, which is cached in
    `cache_dir`. model: in place of the config's initial weights; what is frozen in it stays. The
    first Ctrl-C or SIGTERM finishes the step, saves and returns; the second acts at once.
    timeout_s: a step that takes longer ends the process with exit code 1 and a line that says where
    (0: never). Raises GlmCoreError; whatever happens, the newest whole checkpoint stays."""
    out, t = Path(out_dir), config.train
    start = checkpoint.starting_point(out, resume)
    # before the data is tokenized
    require_able(config, registry.usable(t.backend), prefix=hasattr(model, "prefix"))
    if sampler is None:
        # here, so that a sampler of the caller's own needs no sentencepiece
        from glm_core.data.open import open_sampler

        sampler = open_sampler(config.data, t.seed, cache_dir, positions=config.model.positions)
    checkpoints = checkpoint.FileCheckpoints(out / checkpoint.FOLDER, t.keep)
    with remedies(out, lambda: checkpoints.latest() or start):
        with device_errors.explained(t.backend, "start"):
            parallel = SingleProcess(config, model=model)
            trainer = Trainer(config, sampler, parallel, checkpoints)
            if start is not None:
                trainer.restore(checkpoints.open(start))
        remedy = f"reset the device, then resume from {checkpoints.folder}"
        with (
            watchdog.guard(timeout_s, f"backend {t.backend}", remedy),
            registry.use(trainer.backend, strict=t.strict, exact=t.exact) as session,
            reporting(trainer, out, tensorboard, live),
            stop_requests() as requests,
        ):
            return loop(trainer, session, lambda: bool(requests), start)


@contextmanager
def reporting(trainer: Trainer, out: Path, tensorboard: bool, live: Live | None) -> Iterator[None]:
    """Writes into the run's folder what the run is, and in the block the trainer's metrics."""
    out.mkdir(parents=True, exist_ok=True)
    with closing(Metrics(out, trainer.steps_done, tensorboard, live)) as trainer.metrics:
        checkpoint.describe(out, trainer.config, trainer.sampler)
        yield


@contextmanager
def remedies(out: Path, latest: Callable[[], Path | None]) -> Iterator[None]:
    """Adds to a device's error in the block which checkpoint is the last one, and turns a disk's
    error into a TrainingError that says what to do."""
    try:
        yield
    except DeviceError as error:
        last = f"last checkpoint: {latest() or 'none'}"
        raise DeviceError(f"{error}; {last}", **error.place) from error.__cause__
    except OSError as error:
        raise TrainingError(
            f"{out}: {error}; make it writable or make room, then resume"
        ) from error

"""What a cache holds follows from the memory that is free; what cannot fit is refused with the
figure and the ways out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glm_core.errors import ConfigError
from glm_core.measure.memory import free_bytes, host_free_bytes
from glm_core.model.fit import ENOUGH, LEAST, SHARE, Fit, Sizes, fit

GLM4_9B = Sizes(2_480_000_000, 408_000_000, 40, 40 * 2 * 2 * 128 * 2)
"""GLM-4-9B-chat in bfloat16, rounded"""
LONGEST = 131_072
GB = 10**9


def free(cache_tokens: int, sizes: Sizes = GLM4_9B, weights: int | None = None) -> int:
    """Returns free bytes with room for the weights and so many tokens."""
    return round(((weights or sizes.weights) + cache_tokens * sizes.token) / SHARE) + 99


@pytest.mark.parametrize(
    ("room", "asked", "expected"),
    [
        (16 * LONGEST, {"most_slots": 16}, (16, LONGEST)),
        (16 * 10_000, {"most_slots": 16}, (16, 9_984)),
        (5 * ENOUGH, {"most_slots": 16}, (5, ENOUGH)),
        (3_000, {"most_slots": 16}, (1, 2_944)),
        (40_000, {"slots": 4}, (4, 9_984)),
        (40_000, {"context": 20_000, "most_slots": 16}, (2, 20_000)),
        (40_000, {"slots": 2, "context": 20_000}, (2, 20_000)),
        (40_000, {"context": 200}, (1, 200)),
        (2 * LONGEST, {"context": 2 * LONGEST}, (1, LONGEST)),
    ],
)
def test_slots_and_context_fit(room: int, asked: dict[str, int], expected: tuple[int, int]) -> None:
    found = fit(GLM4_9B, free(room), LONGEST, **asked)
    assert found == Fit(*expected, 40)
    assert found.slots * found.context <= room


def test_unknown_memory_refuses_nothing() -> None:
    assert fit(GLM4_9B, None, LONGEST, most_slots=16) == Fit(16, LONGEST, 40)


@pytest.mark.parametrize(
    ("room", "asked", "advice"),
    [
        (
            40_000,
            {"slots": 16, "context": LONGEST},
            ["85.9 GB", "84.3 GB are missing", "--context 2500, or 4 bits"],
        ),
        (3_000, {"slots": 16}, [f"16 x {LEAST} tokens", "--slots 2, or --context 187, or"]),
        (
            -100_000,
            {},
            ["4.1 GB are missing", "4 bits (weights 7.4 GB", "--offload (weights 3.3 GB"],
        ),
    ],
)
def test_what_cannot_fit_is_refused(room: int, asked: dict[str, int], advice: list[str]) -> None:
    ways = {"--dtype bfloat16": GLM4_9B, "4 bits": GLM4_9B._replace(layer=123_000_000)}
    with pytest.raises(ConfigError) as refusal:
        fit(GLM4_9B, free(room), LONGEST, ways=ways, **asked)
    message = str(refusal.value)
    assert "\n" not in message
    assert "--dtype" not in message  # it would not make the weights smaller
    for words in advice:
        assert words in message


def test_layers_that_do_not_fit_are_streamed() -> None:
    """The cache comes first, then as many layers as there is room for beside two buffers."""
    ends, layer = GLM4_9B.ends, GLM4_9B.layer
    room = free(ENOUGH, weights=ends + 12 * layer)
    assert fit(GLM4_9B, room, LONGEST, offload=True) == Fit(1, ENOUGH, 10)
    assert fit(GLM4_9B, free(ENOUGH), LONGEST, offload=True) == Fit(1, ENOUGH, 40)
    least = free(LEAST, weights=ends + 2 * layer)
    assert fit(GLM4_9B, least, LONGEST, offload=True) == Fit(1, LEAST, 0)
    with pytest.raises(ConfigError, match="2 layers, embedding and head take 3"):
        fit(GLM4_9B, least - 10**8, LONGEST, offload=True)


def test_devices_tell_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(mem_get_info=lambda device: (5 * GB, 8 * GB))
    monkeypatch.setattr(torch, "npu", device, raising=False)
    assert free_bytes(SimpleNamespace(type="npu")) == 5 * GB  # type: ignore[arg-type]  # no such device here
    assert free_bytes(torch.device("meta")) is None
    assert free_bytes(torch.device("cpu")) == pytest.approx(host_free_bytes(), rel=0.5)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_free_memory_counts_the_limits_of_containers(tmp_path: Path) -> None:
    assert host_free_bytes(tmp_path) is None
    write(tmp_path, {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable:  4000000 kB\n"})
    assert host_free_bytes(tmp_path) == 4_096_000_000
    write(tmp_path, {"proc/self/cgroup": "5:cpu:/x\n4:memory:/outer/inner\n0::/two/three\n"})
    assert host_free_bytes(tmp_path) == 4_096_000_000
    v1, v2 = "sys/fs/cgroup/memory/", "sys/fs/cgroup/"
    stat = "total_inactive_file 200\ntotal_active_file 300\ninactive_file 9\n"
    for folder, limit in (("outer/inner/", 2**62), ("outer/", 3 * GB)):
        write(
            tmp_path,
            {
                f"{v1}{folder}memory.limit_in_bytes": str(limit),
                f"{v1}{folder}memory.usage_in_bytes": "1000000000",
                f"{v1}{folder}memory.stat": stat,
            },
        )
    assert host_free_bytes(tmp_path) == 2 * GB + 500
    write(
        tmp_path,
        {
            f"{v2}two/three/memory.max": "max\n",
            f"{v2}two/three/memory.current": "5\n",
            f"{v2}two/three/memory.stat": "anon 4\ninactive_file 70\n",
            f"{v2}two/memory.max": "1000000100\n",
            f"{v2}two/memory.current": "100\n",
            f"{v2}two/memory.stat": "anon 4\ninactive_file 70\n",
        },
    )
    assert host_free_bytes(tmp_path) == GB + 70
    write(tmp_path, {f"{v2}two/three/memory.max": "3\n"})
    assert host_free_bytes(tmp_path) == 68

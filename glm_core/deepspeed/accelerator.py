"""`get_accelerator()`: DeepSpeed's name for the device, answered by the glm_core backend."""

from __future__ import annotations

import os
from typing import Any

import torch

from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.errors import BackendUnavailableError

_chosen: list[Backend] = []


def backend() -> Backend:
    """The backend of this process: DS_ACCELERATOR's or GLM_CORE's name if it is one of ours, else
    the first usable one of the device torch finds, else cpu."""
    if not _chosen:
        _chosen.append(_choose())
    return _chosen[0]


def _choose() -> Backend:
    asked = os.environ.get("DS_ACCELERATOR")
    if asked:
        return registry.usable("ascend" if asked == "npu" else asked)
    found = torch.accelerator.current_accelerator(check_available=True)
    for name in registry.names() if found is not None else ():
        try:
            candidate = registry.usable(name)
        except BackendUnavailableError:
            continue
        if found is not None and candidate.device_type == found.type:
            return candidate
    return registry.usable("cpu")


def device() -> torch.device:
    """This process's device: the one of its local rank."""
    return backend().device(int(os.environ.get("LOCAL_RANK", 0)))


class Accelerator:
    """What scripts ask of DeepSpeed's accelerator object; anything else it has, torch's own module
    of the device answers."""

    @property
    def _name(self) -> str:
        return backend().name

    def device_name(self, device_index: int | None = None) -> str:
        """`cuda`, or `cuda:1`."""
        kind = backend().device_type
        return kind if device_index is None or kind == "cpu" else f"{kind}:{device_index}"

    def current_device_name(self) -> str:
        """As torch.device takes it."""
        return str(device())

    def current_device(self) -> int | str:
        """Its index; "cpu" on the CPU, as DeepSpeed says."""
        own = device()
        return own.type if own.index is None else own.index

    def communication_backend_name(self) -> str:
        """gloo, nccl, hccl. (DeepSpeed says ccl on the CPU.)"""
        return backend().collective

    def is_available(self) -> bool:
        """The backend is only chosen where it is."""
        return True

    def device_count(self) -> int:
        """1 on the CPU."""
        kind = backend().device_type
        return 1 if kind == "cpu" else int(torch.get_device_module(kind).device_count())

    def set_device(self, device_index: int) -> None:
        """Nothing on the CPU."""
        if backend().device_type != "cpu":
            torch.get_device_module(backend().device_type).set_device(device_index)

    def synchronize(self, device_index: int | None = None) -> None:
        """Returns when all queued work is done."""
        backend().synchronize()

    def is_bf16_supported(self) -> bool:
        """One of the backend's working dtypes?"""
        return torch.bfloat16 in backend().dtypes

    def is_fp16_supported(self) -> bool:
        """One of the backend's working dtypes?"""
        return torch.float16 in backend().dtypes

    def supported_dtypes(self) -> list[torch.dtype]:
        """The backend's working dtypes."""
        return list(backend().dtypes)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes; 0 where the device does not count."""
        return backend().memory_peak_bytes()

    def manual_seed(self, seed: int) -> None:
        """All of torch's generators."""
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        """The device generator's."""
        return backend().rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        """The device generator's."""
        backend().set_rng_state(new_state)

    def empty_cache(self) -> None:
        """Nothing on the CPU."""
        if backend().device_type != "cpu":
            torch.get_device_module(backend().device_type).empty_cache()

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes now; 0 where the device does not count."""
        return self._count("memory_allocated")

    def memory_reserved(self, device_index: int | None = None) -> int:
        """Bytes held by torch now; 0 where the device does not count."""
        return self._count("memory_reserved")

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        """Bytes held by torch at most; 0 where the device does not count."""
        return self._count("max_memory_reserved")

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Nothing where the device does not count."""
        self._count("reset_peak_memory_stats")

    def _count(self, name: str) -> int:
        ask = getattr(torch.get_device_module(backend().device_type), name, None)
        return 0 if ask is None else ask() or 0

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Tensor") and backend().device_type == "cpu":
            return getattr(torch, name)  # get_accelerator().LongTensor([1])
        return getattr(torch.get_device_module(backend().device_type), name)


_accelerator = Accelerator()


def get_accelerator() -> Accelerator:
    """One object per process."""
    return _accelerator

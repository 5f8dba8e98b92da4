"""Decides which glm_core backend a script runs on, and shows it as DeepSpeed's accelerator
object."""

from __future__ import annotations

import os
from typing import Any

import torch

from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.errors import BackendUnavailableError

_chosen: list[Backend] = []


def backend() -> Backend:
    """Returns the backend of this process: the one that DS_ACCELERATOR names, else the first usable
    one for the device torch finds, else cpu. Raises BackendUnavailableError where the named one is
    not usable."""
    if not _chosen:
        _chosen.append(_choose())
    return _chosen[0]


def _choose() -> Backend:
    name = os.environ.get("DS_ACCELERATOR")
    if name:
        return registry.usable("ascend" if name == "npu" else name)
    current = torch.accelerator.current_accelerator(check_available=True)
    for name in registry.names() if current is not None else ():
        try:
            candidate = registry.usable(name)
        except BackendUnavailableError:
            continue
        if current is not None and candidate.device_type == current.type:
            return candidate
    return registry.usable("cpu")


def device() -> torch.device:
    """Returns this process's device, that of its local rank."""
    return backend().device(int(os.environ.get("LOCAL_RANK", 0)))


class Accelerator:
    """The calls of DeepSpeed's accelerator object that scripts use. Any other attribute is that of
    torch's module for the device (torch.cuda, ...)."""

    @property
    def _name(self) -> str:
        return backend().name

    def device_name(self, device_index: int | None = None) -> str:
        """Returns the device's name, such as `cuda`, or `cuda:1` for an index."""
        kind = backend().device_type
        return kind if device_index is None or kind == "cpu" else f"{kind}:{device_index}"

    def current_device_name(self) -> str:
        """Returns the name of this process's device, as torch.device takes it."""
        return str(device())

    def current_device(self) -> int | str:
        """Returns the index of this process's device; on the CPU "cpu", as DeepSpeed does."""
        own = device()
        return own.type if own.index is None else own.index

    def communication_backend_name(self) -> str:
        """Returns gloo, nccl or hccl. (DeepSpeed says ccl on the CPU.)"""
        return backend().collective

    def is_available(self) -> bool:
        """Returns True: only a usable backend is chosen."""
        return True

    def device_count(self) -> int:
        """Returns the number of devices; on the CPU it is LOCAL_SIZE, as in DeepSpeed, else 1."""
        kind = backend().device_type
        if kind == "cpu":
            return int(os.environ.get("LOCAL_SIZE") or 1)
        return int(torch.get_device_module(kind).device_count())

    def set_device(self, device_index: int) -> None:
        """Makes a device torch's current one; does nothing on the CPU."""
        if backend().device_type != "cpu":
            torch.get_device_module(backend().device_type).set_device(device_index)

    def synchronize(self, device_index: int | None = None) -> None:
        """Returns when all queued work is done."""
        backend().synchronize()

    def is_bf16_supported(self) -> bool:
        """Is bfloat16 one of the backend's working dtypes?"""
        return torch.bfloat16 in backend().dtypes

    def is_fp16_supported(self) -> bool:
        """Is float16 one of the backend's working dtypes?"""
        return torch.float16 in backend().dtypes

    def supported_dtypes(self) -> list[torch.dtype]:
        """Returns the backend's working dtypes."""
        return list(backend().dtypes)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """Returns the peak bytes in use; 0 where the device does not count them."""
        return backend().memory_peak_bytes()

    def manual_seed(self, seed: int) -> None:
        """Seeds all of torch's generators."""
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def random(self) -> Any:
        """Returns torch.random."""
        return torch.random

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        """Returns the state of the device's random generator."""
        return backend().rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        """Sets the state of the device's random generator."""
        backend().set_rng_state(new_state)

    def empty_cache(self) -> None:
        """Frees torch's cached memory; does nothing on the CPU."""
        if backend().device_type != "cpu":
            torch.get_device_module(backend().device_type).empty_cache()

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Returns the bytes in use; 0 where the device does not count them."""
        return self._count("memory_allocated")

    def memory_reserved(self, device_index: int | None = None) -> int:
        """Returns the bytes that torch holds; 0 where the device does not count them."""
        return self._count("memory_reserved")

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        """Returns the peak bytes that torch held; 0 where the device does not count them."""
        return self._count("max_memory_reserved")

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Resets the peaks; does nothing where the device does not count bytes."""
        self._count("reset_peak_memory_stats")

    def _count(self, name: str) -> int:
        call = getattr(torch.get_device_module(backend().device_type), name, None)
        return 0 if call is None else call() or 0

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Tensor") and backend().device_type == "cpu":
            return getattr(torch, name)  # get_accelerator().LongTensor([1])
        return getattr(torch.get_device_module(backend().device_type), name)


_accelerator = Accelerator()


def get_accelerator() -> Accelerator:
    """Returns this process's one accelerator object."""
    return _accelerator


def is_current_accelerator_supported() -> bool:
    """Returns True: only a usable backend is chosen."""
    return get_accelerator().is_available()

"""Decides whether this torch can use a GPU here. If not, says why and what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

from glm_core.backends.base import Probe


class Facts(NamedTuple):
    """What is known about this machine's torch and GPUs."""

    torch: str
    cuda: str | None
    """CUDA version torch was built with"""
    hip: str | None
    trouble: str
    """first line of the error that starting the CUDA runtime raised; '' where it started"""
    devices: int
    visible: str | None
    """value of CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES"""
    capability: str = ""
    """architecture of the first device, such as sm_90 or gfx90a"""
    built: tuple[str, ...] = ()
    """architectures that this torch has kernels for"""
    dtk: str = ""
    """folder of Hygon's DTK; '' where there is none"""


def dtk(root: Path = Path("/")) -> str:
    """Returns the folder of Hygon's toolkit, '' where there is none."""
    return next((str(p) for p in sorted(root.glob("opt/dtk*"))), "")


def facts() -> Facts:
    """Collects the facts of this machine; starts the CUDA runtime where torch has one."""
    hip = torch.version.hip
    variable = "HIP_VISIBLE_DEVICES" if hip else "CUDA_VISIBLE_DEVICES"
    visible = os.environ.get(variable)
    known = Facts(torch.__version__, torch.version.cuda, hip, "", 0, visible, dtk=dtk())
    if not (torch.version.cuda or hip):
        return known
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return known._replace(trouble=str(error).strip().splitlines()[0])
    return known._replace(
        devices=torch.cuda.device_count(),
        capability=architecture(),
        built=tuple(torch.cuda.get_arch_list()),
    )


def architecture(index: int = 0) -> str:
    """Returns a device's architecture, such as sm_90 or gfx90a."""
    if torch.version.hip:
        properties = torch.cuda.get_device_properties(index)
        return str(properties.gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def cuda(seen: Facts) -> Probe:
    """Decides whether the NVIDIA backend is usable."""
    if seen.hip:
        return Probe(False, f"torch {seen.torch} is built for ROCm; use backend rocm")
    if not seen.cuda:
        return Probe(
            False, f"torch {seen.torch} is built without CUDA; install a CUDA build of torch"
        )
    return _runtime(seen, "NVIDIA", f"a driver for CUDA {seen.cuda}", "CUDA_VISIBLE_DEVICES")


def rocm(seen: Facts) -> Probe:
    """Decides whether the AMD and Hygon backend is usable."""
    if seen.dtk and not seen.hip:
        return Probe(
            False,
            f"torch {seen.torch} is not the one of {seen.dtk}: pip may have replaced it; install "
            "the wheel that comes with this DTK (its version ends in +das...dtk...)",
        )
    if seen.cuda:
        return Probe(False, f"torch {seen.torch} is built for CUDA; use backend cuda")
    if not seen.hip:
        return Probe(
            False,
            f"torch {seen.torch} is built without ROCm; install a ROCm build of torch (on a Hygon "
            "DCU the one that comes with its DTK: stock ROCm does not know Hygon's driver)",
        )
    return _runtime(seen, "AMD or Hygon", f"a driver for HIP {seen.hip}", "HIP_VISIBLE_DEVICES")


def _runtime(seen: Facts, vendor: str, driver: str, variable: str) -> Probe:
    if seen.trouble:
        return Probe(False, f"{seen.trouble}; install {driver} or another torch")
    if not seen.devices:
        hidden = f"{variable}={seen.visible!r} hides them; unset it" if seen.visible else ""
        return Probe(
            False, f"no {vendor} device; {hidden or 'check that this machine or container has one'}"
        )
    family = seen.capability.rstrip("0123456789")
    if seen.built and not any(_runs_on(arch, seen.capability) for arch in seen.built):
        return Probe(
            False,
            f"this device is {seen.capability}, torch {seen.torch} has kernels for "
            f"{', '.join(a for a in seen.built if a.startswith(family[:2]))}; "
            "install a torch built for it",
        )
    return Probe(True)


def _runs_on(built: str, device: str) -> bool:
    """Decides whether kernels built for one architecture run on a device. NVIDIA's binaries run on
    their major version from their minor version on, PTX on anything newer; AMD's only on the
    architecture they were built for."""
    kind, _, number = built.partition("_")
    have = device.partition("_")[2]
    if not have or not number.rstrip("af").isdigit():
        return built.partition(":")[0] == device
    need, got = int(number.rstrip("af")), int(have)
    return need <= got if kind == "compute" else need // 10 == got // 10 and need <= got

"""Facts about the machine that belong to every result, and whether its KVM can run L1s."""

from __future__ import annotations

import functools
import os
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from kvmnest.errors import HarnessError
from kvmnest.known import same_parameter
from kvmnest.kvm.cpuid import CPUID_1_ECX_VMX, leaf

if TYPE_CHECKING:
    from kvmnest.kvm import Kvm

PARAMETERS = Path("/sys/module/kvm_intel/parameters")


@functools.cache
def kvm_intel_params() -> dict[str, str]:
    """Parameters of the loaded kvm_intel as sysfs shows them; empty when it is not loaded."""
    values: dict[str, str] = {}
    try:
        names = sorted(os.listdir(PARAMETERS))
    except OSError:
        return values
    for name in names:
        try:
            values[name] = (PARAMETERS / name).read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            continue  # some are readable by root only
    return values


def kernel() -> str:
    """Release of the running kernel, like uname -r."""
    return os.uname().release


def cpu_model() -> str:
    """Name and family-model-stepping of the first CPU, from /proc/cpuinfo."""
    found: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if not name.strip():
                    break
                found[name.strip()] = value.strip()
    except OSError:
        return ""
    numbers = [found.get(key, "?") for key in ("cpu family", "model", "stepping")]
    return f"{found.get('model name', 'unknown CPU')} ({'-'.join(numbers)})"


@functools.cache
def cpu_flags() -> str:
    """Features of the first CPU as /proc/cpuinfo lists them, those of VMX behind the others.

    They are separated by spaces.
    """
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            first = [*takewhile(str.strip, lines)]
    except OSError:
        return ""
    found = dict(line.partition(":")[::2] for line in first)
    features = {name.strip(): value.split() for name, value in found.items()}
    return " ".join((*features.get("flags", ()), *features.get("vmx flags", ())))


def params_text(params: dict[str, str]) -> str:
    """Parameters in one line."""
    if not params:
        return "kvm_intel not loaded as a module"
    return "kvm_intel " + " ".join(f"{name}={value}" for name, value in params.items())


def offers_vmx(kvm: Kvm) -> bool:
    """Whether KVM_GET_SUPPORTED_CPUID has VMX, which a guest needs for VMXON."""
    return bool(leaf(kvm.supported_cpuid(), 1).ecx & CPUID_1_ECX_VMX)


def no_vmx_reason() -> str:
    """Why KVM offers no VMX to guests on this machine, and what to do, in one line."""
    nested = kvm_intel_params().get("nested")
    if nested is not None and not same_parameter(nested, True):
        return (
            f"kvm_intel has nested={nested}; stop all VMs, then: modprobe -r kvm_intel &&"
            " modprobe kvm_intel nested=1 (to keep it: options kvm_intel nested=1 in"
            " /etc/modprobe.d/kvm.conf)"
        )
    if "vmx" in cpu_flags().split():
        return "the CPU has VMX, but kvm_intel is not the module behind /dev/kvm"
    return "this CPU has no VMX (no vmx flag in /proc/cpuinfo)"


class NoVmx(HarnessError):
    """/dev/kvm works, but its guests get no VMX; ``reason`` says why and what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"/dev/kvm offers no VMX to guests: {reason}")
        self.reason = reason


def require_kvm() -> None:
    """Raise KvmUnavailable or NoVmx unless guests of this machine's /dev/kvm get VMX."""
    from kvmnest.kvm import Kvm

    with Kvm() as kvm:
        if not offers_vmx(kvm):
            raise NoVmx(no_vmx_reason())


def why_not_kvm() -> str:
    """Why cases cannot run on this machine's /dev/kvm, in one line; "" if they can."""
    from kvmnest.kvm import KvmUnavailable

    try:
        require_kvm()
    except NoVmx as error:
        return error.reason
    except KvmUnavailable as error:
        return str(error)
    return ""

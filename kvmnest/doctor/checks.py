"""Is this machine ready, and if not, which command makes it so."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvmnest import host
from kvmnest.known import same_parameter
from kvmnest.kvm import Cap, Kvm, KvmUnavailable
from kvmnest.lab import cache, kernels, tools
from kvmnest.lab.errors import LabSetupError
from kvmnest.vmx import Capabilities, FeatureControl, Msr, PinCtl, Proc2Ctl, ProcCtl
from kvmnest.vmx.msrs import VMX_MSRS

OK, WARNING, BAD = "ok", "warning", "bad"

#: Free space that a kernel, its snapshots and the layers take, in bytes.
DISK_NEEDED = 2 << 30
_LAB_TOOLS = ("bochs", "dpkg-deb", "apt-get", "objcopy", "as", "ld")
_CAPS = (
    *(Cap.NESTED_STATE, Cap.IMMEDIATE_EXIT, Cap.SPLIT_IRQCHIP, Cap.SIGNAL_MSI, Cap.X86_SMM),
    *(Cap.EXCEPTION_PAYLOAD, Cap.X86_TRIPLE_FAULT_EVENT, Cap.READONLY_MEM),
)
_FEATURES = (
    *(Proc2Ctl.ENABLE_EPT, Proc2Ctl.UNRESTRICTED_GUEST, Proc2Ctl.ENABLE_VPID),
    *(Proc2Ctl.VMCS_SHADOWING, Proc2Ctl.ENABLE_PML, Proc2Ctl.APIC_REGISTER_VIRTUALIZATION),
    *(
        ProcCtl.MONITOR_TRAP_FLAG,
        PinCtl.ACTIVATE_PREEMPTION_TIMER,
        PinCtl.PROCESS_POSTED_INTERRUPTS,
    ),
)


@dataclass(frozen=True)
class Check:
    """One thing looked at: ``state`` is "ok", "warning" or "bad"; ``fix`` a command, if any."""

    name: str
    state: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Report:
    """All checks, and where the suite can run: "kvm", "lab", or "" for nowhere."""

    target: str
    checks: tuple[Check, ...]

    def document(self) -> dict[str, Any]:
        """As a JSON document."""
        return {"target": self.target or None, "checks": [asdict(check) for check in self.checks]}


def examine() -> Report:
    """Look at everything; nothing is changed and nothing is raised for what is missing."""
    here = list(_kvm_checks())
    lab = list(_lab_checks())
    if all(check.state != BAD for check in here):
        target = "kvm"
    elif all(check.state != BAD for check in lab):
        target = "lab"
    else:
        target = ""
    return Report(target, (*_machine_checks(), *here, *lab))


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            found = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return set()
    return set(found.partition(":")[2].split())


def _machine_checks() -> Iterator[Check]:
    yield Check("kernel", OK, host.kernel())
    yield Check("CPU", OK, host.cpu_model() or "unknown")
    if "hypervisor" in _cpu_flags():
        vendor = _text("/sys/class/dmi/id/sys_vendor") or "unknown"
        yield Check("machine", OK, f"a virtual machine ({vendor}): its hypervisor answers too")
    else:
        yield Check("machine", OK, "bare metal")


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _kvm_checks() -> Iterator[Check]:
    if "vmx" in _cpu_flags():
        yield Check("VT-x", OK, "CPUID.VMX")
        yield _feature_control()
    else:
        yield Check("VT-x", BAD, "this CPU has no VMX (no vmx flag in /proc/cpuinfo)")
    yield _module()
    try:
        kvm = Kvm()
    except KvmUnavailable as error:
        yield Check("/dev/kvm", BAD, str(error), _kvm_fix())
        return
    with kvm:
        yield Check("/dev/kvm", OK, f"KVM API {kvm.api_version}")
        missing = [cap.name for cap in _CAPS if not kvm.check_extension(cap)]
        text = f"without {', '.join(missing)}: cases that need them are skipped" if missing else ""
        yield Check(
            "KVM capabilities", WARNING if missing else OK, text or f"all {len(_CAPS)} looked for"
        )
        if not host.offers_vmx(kvm):
            yield Check("VMX for guests", BAD, host.no_vmx_reason())
            return
        yield Check("VMX for guests", OK, "KVM_GET_SUPPORTED_CPUID has VMX")
        caps = Capabilities.from_msrs(
            kvm.feature_msrs([i for i in kvm.msr_feature_index_list() if i in VMX_MSRS])
        )
        absent = [flag.name or "" for flag in _FEATURES if not caps.supports(flag)]
        text = f"without {', '.join(absent)}" if absent else f"all {len(_FEATURES)} looked for"
        yield Check("VMX features", OK, text)


def _kvm_fix() -> str:
    if not os.path.exists("/dev/kvm"):
        return "modprobe kvm_intel nested=1"
    return f"adduser {os.environ.get('USER', 'USER')} kvm, then log in again"


def _module() -> Check:
    params = host.kvm_intel_params()
    if params:
        nested = params.get("nested")
        if same_parameter(nested, True):
            return Check("kvm_intel", OK, f"loaded, nested={nested}")
        return Check(
            "kvm_intel", BAD, f"loaded, nested={nested}",
            "modprobe -r kvm_intel && modprobe kvm_intel nested=1",
        )  # fmt: skip
    if os.path.isdir("/sys/module/kvm_amd"):
        return Check("kvm_intel", BAD, "not loaded: kvm_amd is, which has no VMX")
    if "vmx" not in _cpu_flags():
        return Check("kvm_intel", BAD, "not loaded: it needs VT-x")
    return Check("kvm_intel", BAD, "not loaded", "modprobe kvm_intel nested=1")


def _feature_control() -> Check:
    """IA32_FEATURE_CONTROL as firmware left it (SDM, "Enabling and Entering VMX Operation")."""
    try:
        with open("/dev/cpu/0/msr", "rb") as file:
            file.seek(Msr.IA32_FEATURE_CONTROL)
            (value,) = struct.unpack("<Q", file.read(8))
    except OSError:
        return Check("IA32_FEATURE_CONTROL", OK, "not readable here (root and modprobe msr)")
    wanted = FeatureControl.LOCKED | FeatureControl.VMX_OUTSIDE_SMX
    if value & FeatureControl.LOCKED and value & wanted != wanted:
        return Check(
            "IA32_FEATURE_CONTROL", BAD, f"{value:#x}: firmware has locked VMX off",
            "enable VT-x in the firmware's setup",
        )  # fmt: skip
    return Check("IA32_FEATURE_CONTROL", OK, f"{value:#x}")


def _lab_checks() -> Iterator[Check]:
    for name in _LAB_TOOLS:
        try:
            tools.find(name)
        except LabSetupError as error:
            _, _, fix = str(error).partition(": ")
            yield Check(f"lab: {name}", BAD, "not found", fix)
    try:
        folder = cache.root()
        found = sorted(kernels.cached_releases())
        free = shutil.disk_usage(folder).free
    except (LabSetupError, OSError) as error:
        yield Check("lab: cache", BAD, str(error))
        return
    text = ", ".join(found) if found else "none yet: the first run fetches one"
    yield Check("lab: kernels", OK, text)
    enough = free >= DISK_NEEDED
    yield Check(
        "lab: disk", OK if enough else BAD, f"{free >> 20} MiB free in {folder}",
        "" if enough else "free some space, or set XDG_CACHE_HOME to another disk",
    )  # fmt: skip

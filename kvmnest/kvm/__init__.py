"""Bindings to /dev/kvm: the system, a VM, a vCPU. They know KVM and nothing of VMX.

The names below load on first use (PEP 562): ``kvmnest.kvm.cdef`` has to be importable before
the file that it generates exists, and importing a submodule imports this package first.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmnest.kvm.caps import Cap as Cap
    from kvmnest.kvm.errors import KvmError as KvmError
    from kvmnest.kvm.errors import KvmMsrError as KvmMsrError
    from kvmnest.kvm.errors import KvmUnavailable as KvmUnavailable
    from kvmnest.kvm.exits import *  # noqa: F403
    from kvmnest.kvm.memory import Memory as Memory
    from kvmnest.kvm.memory import SealedMemory as SealedMemory
    from kvmnest.kvm.native import CData as CData
    from kvmnest.kvm.native import ffi as ffi
    from kvmnest.kvm.state import MsrList as MsrList
    from kvmnest.kvm.state import TscOffset as TscOffset
    from kvmnest.kvm.system import Kvm as Kvm
    from kvmnest.kvm.vcpu import Vcpu as Vcpu
    from kvmnest.kvm.vm import Vm as Vm

_HOMES = {
    "CData": "native",
    "Cap": "caps",
    "Kvm": "system",
    "KvmError": "errors",
    "KvmMsrError": "errors",
    "KvmUnavailable": "errors",
    "Memory": "memory",
    "SealedMemory": "memory",
    "MsrList": "state",
    "TscOffset": "state",
    "Vcpu": "vcpu",
    "Vm": "vm",
    "ffi": "native",
}


def __getattr__(name: str) -> object:
    home = "exits" if name.endswith("Exit") else _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value

"""Print what KVM offers to guests as JSON: also run inside the lab's guest, as a module."""

from __future__ import annotations

import json
from typing import Any

from kvmnest import host
from kvmnest.cases.offer import HostOffer

SCHEMA = 1


def read() -> dict[str, Any]:
    """VMX capability MSRs as a vCPU has them, with the facts they belong to.

    ``msrs`` maps indices to values, both as hexadecimal text. Raises KvmUnavailable without
    /dev/kvm; without VMX ``msrs`` is empty and ``reason`` says why.
    """
    offer = HostOffer()
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "kernel": host.kernel(),
        "cpu": host.cpu_model(),
        "kvm_params": host.kvm_intel_params(),
        "msrs": {},
    }
    if offer.vmx:
        msrs = offer.caps.msrs
        found["msrs"] = {f"{index:#x}": f"{msrs[index]:#x}" for index in sorted(msrs)}
    else:
        found["reason"] = host.no_vmx_reason()
    offer.close()
    return found


if __name__ == "__main__":
    print(json.dumps(read()))

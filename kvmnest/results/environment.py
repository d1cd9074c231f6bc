"""Choice of the target, and why /dev/kvm cannot run L1."""

from __future__ import annotations

from kvmnest.errors import HarnessError
from kvmnest.host import no_vmx_reason, offers_vmx
from kvmnest.kvm import Kvm, KvmUnavailable


def why_not_kvm() -> str:
    """Why cases cannot run on this machine's /dev/kvm, in one line; "" if they can."""
    try:
        with Kvm() as kvm:
            return "" if offers_vmx(kvm) else no_vmx_reason()
    except KvmUnavailable as error:
        return str(error)


def require_kvm() -> None:
    """Raise HarnessError unless guests of this machine's /dev/kvm get VMX."""
    reason = why_not_kvm()
    if reason.startswith("/dev/kvm"):  # it cannot be used at all
        raise HarnessError(reason)
    if reason:
        raise HarnessError(f"/dev/kvm offers no VMX to guests: {reason}")

"""Can a case run on this machine? If not, the exact reason."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence

from kvmnest import host
from kvmnest.cases.offer import HostOffer


def why_skipped(
    offer: HostOffer,
    flags: Sequence[enum.Enum],
    params: Mapping[str, object],
    *,
    vmx: bool,
) -> str:
    """Reason to skip a case, "" if it can run.

    ``flags`` are capability flags that it needs (see HostOffer.missing), ``params`` values of
    kvm_intel's parameters; ``vmx`` says that it needs VMX as such. Raises KvmUnavailable.
    """
    lacking = offer.lacks(params)
    if lacking:
        return f"needs {lacking}"
    missing = offer.missing(*flags) if flags else []
    if missing:
        return "needs " + "; ".join(missing)
    if vmx and not offer.vmx:
        return f"KVM offers no VMX to guests: {host.no_vmx_reason()}"
    return ""

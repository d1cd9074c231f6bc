"""What a reproducer says about its bug. Scripts import this in the lab's guest: keep it small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

#: How the release that brought a bug is known.
SINCE_BY = ("Fixes", "message", "source", "CVE")


@dataclass(frozen=True, kw_only=True)
class Bug:
    """A bug; its title is the first line of the script's docstring.

    Attributes:
        subject: subject of the upstream commit that fixed it; "" if none has.
        hash: that commit, as far as it is known for sure.
        cve: "CVE-YEAR-NUMBER".
        since: release, or commit and release, that brought the bug; "" unless it is known.
        since_by: how that is known: "Fixes" (tag of the commit that fixed it), "message" (what a
            commit to the same code says), "source" (the release has the code at fault; the one
            before it has not, or has no nested VMX).
        fixed: first version without it.
        vulnerable: what is seen on a kernel with the bug.
        correct: what is seen on one without.
        death: how the error begins by which the VM dies of this bug ("VmLost: triple fault",
            "KvmError: KVM_RUN", "crashed: " for the kernel itself); any other death proves nothing.
        params: module parameters that the bug needs, as ``{"ept": "0"}``; ``kvm.NAME`` for those
            of kvm.
        edit: brings the bug back into today's KVM: ``file``, ``function``, ``expression``, which
            must occur once in the function, and ``replacement`` (see ``kvmnest.kernel.edits``).
        edit_since: the first version, as "6.15", whose source the edit is for; older kernels have
            the bug themselves. "" for any.
        newer: its texts for later sources, oldest first: ``since`` ("7.2") and what differs.
        fix: edits, as ``edit``, that mend today's KVM, for a bug that nobody has fixed.
    """

    subject: str = ""
    hash: str = ""
    cve: str = ""
    since: str = ""
    since_by: str = ""
    fixed: str = ""
    vulnerable: str
    correct: str
    death: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    edit: Mapping[str, str] = field(default_factory=dict)
    edit_since: str = ""
    newer: Sequence[Mapping[str, str]] = ()
    fix: Sequence[Mapping[str, str]] = ()

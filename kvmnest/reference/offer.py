"""What the CPU offers in a session that runs on the reference target."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from functools import cached_property

from kvmnest.cases.offer import HostOffer
from kvmnest.kvm import Kvm
from kvmnest.kvm.cpuid import leaf
from kvmnest.reference.kvm import ReferenceKvm


class ReferenceOffer(HostOffer):
    """A bare CPU in place of /dev/kvm; ``bochs`` and ``model`` as in ``ReferenceKvm``."""

    def __init__(self, bochs: str | None = None, model: str | None = None) -> None:
        self._wanted = (bochs, model)

    @cached_property
    def kvm(self) -> Kvm:
        """The system object. Raises LabSetupError when a CPU is first asked for."""
        return ReferenceKvm(*self._wanted)

    @property
    def kernel(self) -> str:
        """There is none."""
        return "none"

    @property
    def cpu(self) -> str:
        """The model that Bochs emulates."""
        kvm = self.kvm
        assert isinstance(kvm, ReferenceKvm)
        return f"{kvm.emulator.model.name} of {kvm.emulator.cpu_emulator}"

    @property
    def cpu_flags(self) -> str:
        """Those that ``kvmnest.known`` asks for, by CPUID."""
        seven = leaf(self.kvm.supported_cpuid(), 7)
        return "umip" if seven.ecx & 1 << 2 else ""

    @property
    def params(self) -> dict[str, str]:
        """There is no kvm_intel."""
        return {}

    @property
    def has_kernel_log(self) -> bool:
        """What this machine's kernel says is about no case."""
        return False

    def lacks(self, flags: Mapping[str, object]) -> str:
        """Any parameter of kvm_intel needs a host."""
        return f"a host: kvm_intel with {next(iter(flags))}" if flags else ""

    def missing(self, *flags: enum.Enum) -> list[str]:
        """As of ``HostOffer``, but all of KVM's capabilities need a host."""
        from kvmnest.kvm import Cap

        caps = [f"a host: KVM_CAP_{flag.name}" for flag in flags if isinstance(flag, Cap)]
        return caps + super().missing(*(flag for flag in flags if not isinstance(flag, Cap)))

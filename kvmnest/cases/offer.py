"""What this machine's KVM offers to the cases of one session, found out once."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from kvmnest import host
from kvmnest.host import no_vmx_reason, offers_vmx
from kvmnest.known import same_parameter

if TYPE_CHECKING:
    from kvmnest.kvm import Kvm
    from kvmnest.vmx import Capabilities


class HostOffer:
    """The open /dev/kvm and what is asked of it again and again."""

    @cached_property
    def kvm(self) -> Kvm:
        """The system object, open until the session ends. Raises KvmUnavailable."""
        from kvmnest.kvm import Kvm

        return Kvm()

    @cached_property
    def vmx(self) -> bool:
        """Whether guests get VMX."""
        return offers_vmx(self.kvm)

    @cached_property
    def caps(self) -> Capabilities:
        """VMX capabilities that KVM offers to guests. Raises ValueError without VMX."""
        from kvmnest.vmx import Capabilities
        from kvmnest.vmx.msrs import VMX_MSRS

        indices = [i for i in self.kvm.msr_feature_index_list() if i in VMX_MSRS]
        # A vCPU's own MSRs: some controls depend on its CPUID ("enable XSAVES/XRSTORS" does).
        with self.kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
            vcpu.set_cpuid(self.kvm.supported_cpuid())
            return Capabilities.from_msrs(vcpu.get_msrs(indices))

    @property
    def kernel(self) -> str:
        """Release of the kernel under test."""
        return host.kernel()

    @property
    def cpu(self) -> str:
        """Name and family-model-stepping of the CPU."""
        return host.cpu_model()

    @property
    def cpu_flags(self) -> str:
        """The flags of /proc/cpuinfo, separated by spaces."""
        return host.cpu_flags()

    @property
    def params(self) -> dict[str, str]:
        """Parameters of kvm_intel."""
        return host.kvm_intel_params()

    @property
    def has_kernel_log(self) -> bool:
        """Whether what this kernel says while a case runs is about the case."""
        return True

    def lacks(self, params: Mapping[str, object]) -> str:
        """Which of these values of kvm_intel's parameters is not the present one; "" if none."""
        present = self.params if params else {}
        for name, value in params.items():
            have = present.get(name)
            if not same_parameter(have, value):
                shown = (
                    f"kvm_intel.{name}={have}" if have is not None else f"no kvm_intel.{name} here"
                )
                wanted = {True: "Y", False: "N"}[value] if isinstance(value, bool) else value
                return f"kvm_intel.{name}={wanted}: {shown}"
        return ""

    def missing(self, *flags: enum.Enum) -> list[str]:
        """What of ``flags`` is not there, one text each with the bit and where it is reported.

        Flags are control and capability flags of ``kvmnest.vmx``, VMCS fields, and capabilities
        of KVM (``kvmnest.kvm.Cap``).
        """
        from kvmnest.kvm import Cap
        from kvmnest.vmx import Field

        texts = []
        for flag in flags:
            if isinstance(flag, Cap):
                if not self.kvm.check_extension(flag):
                    texts.append(f"KVM_CAP_{flag.name}: KVM_CHECK_EXTENSION gives 0")
            elif not self.vmx:
                texts.append(f"{type(flag).__name__}.{flag.name}: no VMX here: {no_vmx_reason()}")
            elif isinstance(flag, Field):
                if not self.caps.field_exists(flag):
                    texts.append(f"Field.{flag.name}: no capability MSR reports it")
            elif isinstance(flag, enum.IntFlag):
                texts.extend(self.caps.missing(flag))
            else:
                raise TypeError(f"needs({flag!r}): not a capability flag")
        return texts

    def close(self) -> None:
        """Close /dev/kvm if it was opened."""
        kvm = self.__dict__.pop("kvm", None)
        if kvm is not None:
            kvm.close()

"""Errors of the bindings: each names the ioctl, the object, errno and what to do about it."""

import errno
import os

from kvmnest.errors import KvmnestError

_HINTS = {
    ("KVM_CREATE_VM", errno.EBUSY): "another hypervisor uses the CPU's virtualization",
    ("KVM_CREATE_VM", errno.EINVAL): "no such VM type on this host",
    ("KVM_CREATE_VCPU", errno.EEXIST): "the VM has a vCPU with this id already",
    ("KVM_CREATE_VCPU", errno.EINVAL): "the id is above KVM_CAP_MAX_VCPU_ID",
    ("KVM_CREATE_IRQCHIP", errno.EEXIST): "the VM has an in-kernel irqchip already",
    ("KVM_CREATE_IRQCHIP", errno.EINVAL): "create the irqchip before the first vCPU",
    ("KVM_CREATE_PIT2", errno.ENOENT): "create_irqchip() comes first",
    ("KVM_SET_USER_MEMORY_REGION", errno.EINVAL): (
        "slot number, alignment to 4096, flags or a change other than of address and flags"
    ),
    ("KVM_SET_USER_MEMORY_REGION", errno.EEXIST): "the range overlaps another slot",
    ("KVM_GET_DIRTY_LOG", errno.ENOENT): "no slot of this number with log_dirty=True",
    ("KVM_CLEAR_DIRTY_LOG", errno.ENOENT): "no slot of this number with log_dirty=True",
    ("KVM_CLEAR_DIRTY_LOG", errno.EINVAL): (
        "first_page and num_pages are multiples of 64, or num_pages ends with the slot"
    ),
    ("KVM_SET_TSS_ADDR", errno.EINVAL): (
        "only kvm_intel implements it, for an address below 4 GiB minus 3 pages"
    ),
    ("KVM_SET_IDENTITY_MAP_ADDR", errno.EINVAL): "it comes before the first vCPU",
    ("KVM_SET_SREGS", errno.EINVAL): (
        "KVM found the state inconsistent: CR0.PG without PE, EFER.LMA without LME and CR0.PG,"
        " CR4 or EFER bits that the vCPU's CPUID lacks, or an APIC base with reserved bits"
    ),
    ("KVM_SET_SREGS2", errno.EINVAL): "unknown flags, or an inconsistent state (see KVM_SET_SREGS)",
    ("KVM_SET_CPUID2", errno.EINVAL): (
        "CPUID cannot change after KVM_RUN, nor claim another address width or XSAVE layout"
    ),
    ("KVM_SET_CPUID2", errno.E2BIG): "too many entries",
    ("KVM_SET_MSRS", errno.E2BIG): "too many entries",
    ("KVM_SET_NESTED_STATE", errno.EINVAL): (
        "the state contradicts itself, the vCPU's CPUID, its VMX MSRs, CR0/CR4 or SMM state;"
        " set CPUID, MSRs, sregs and events first"
    ),
    ("KVM_SET_NESTED_STATE", errno.EFAULT): "the size field exceeds the data given",
    ("KVM_SET_VCPU_EVENTS", errno.EINVAL): (
        "unknown flag, a vector above 31, or a field whose capability is not enabled"
    ),
    ("KVM_SET_XCRS", errno.EINVAL): "XCR0 has bits that the vCPU's CPUID lacks, or flags are set",
    ("KVM_SET_XSAVE", errno.EINVAL): "XSTATE_BV or MXCSR has bits that the host lacks",
    ("KVM_SET_DEBUGREGS", errno.EINVAL): "DR6 or DR7 has bits above 31, or flags are set",
    ("KVM_SET_MP_STATE", errno.EINVAL): "the state needs an in-kernel irqchip",
    ("KVM_GET_LAPIC", errno.EINVAL): "the VM has no in-kernel irqchip",
    ("KVM_SET_LAPIC", errno.EINVAL): "the VM has no in-kernel irqchip, or the APIC id differs",
    ("KVM_GET_IRQCHIP", errno.ENXIO): "create_irqchip() comes first",
    ("KVM_SET_IRQCHIP", errno.ENXIO): "create_irqchip() comes first",
    ("KVM_IRQ_LINE", errno.ENXIO): "create_irqchip() comes first",
    ("KVM_SIGNAL_MSI", errno.EINVAL): "the VM has no in-kernel irqchip",
    ("KVM_SET_GSI_ROUTING", errno.EINVAL): "no in-kernel irqchip, or a malformed entry",
    ("KVM_INTERRUPT", errno.EEXIST): "an interrupt is queued already",
    ("KVM_INTERRUPT", errno.ENXIO): "the in-kernel PIC delivers interrupts: use irq_line()",
    ("KVM_INTERRUPT", errno.EINVAL): "the vector is above 255",
    ("KVM_SET_GUEST_DEBUG", errno.EBUSY): "an exception is queued already",
    ("KVM_KVMCLOCK_CTRL", errno.EINVAL): "the guest has not enabled kvmclock",
    ("KVM_SET_TSC_KHZ", errno.EINVAL): "the host cannot scale the TSC to this frequency",
    ("KVM_RUN", errno.EFAULT): "the guest touched a page that its memory slot cannot back",
    ("KVM_RUN", errno.EINVAL): "an entry state that KVM refuses to run",
}

# Ioctls with a hint of their own.
HINTED = {name for name, _ in _HINTS}

_GENERAL = {
    errno.EBADF: "the file descriptor is closed or is not KVM's",
    errno.ENOTTY: "this kernel does not implement the ioctl, or not on this object",
    errno.ENOMEM: "the kernel has no memory for it",
    errno.EMFILE: "too many open files: raise ulimit -n",
    errno.EIO: "the VM is dead (KVM_REQ_VM_DEAD) or belongs to another process",
}


class KvmError(KvmnestError, OSError):
    """An ioctl of KVM failed.

    ``ioctl`` and ``target`` ("vcpu 0", "vm 7") say which; ``errno`` and ``strerror`` are those of
    OSError; ``hint`` may be empty.
    """

    def __init__(self, ioctl: str, target: str, err: int, hint: str = "") -> None:
        super().__init__(err, os.strerror(err))
        self.ioctl = ioctl
        self.target = target
        self.hint = hint or _HINTS.get((ioctl, err), "") or _GENERAL.get(err, "")

    def __str__(self) -> str:
        assert self.errno is not None
        code = errno.errorcode.get(self.errno, str(self.errno))
        text = f"{self.ioctl} on {self.target} failed: {code} ({self.strerror})"
        return f"{text}: {self.hint}" if self.hint else text


class KvmMsrError(KvmError):
    """KVM refused an MSR; ``index`` is the first one refused, ``done`` how many went through."""

    def __init__(self, ioctl: str, target: str, index: int, done: int, total: int) -> None:
        hint = f"MSR {index:#x} was refused (entry {done + 1} of {total})"
        super().__init__(ioctl, target, errno.EINVAL, hint)
        self.index = index
        self.done = done


class KvmUnavailable(KvmnestError):
    """This machine offers no usable KVM; the message is one line with the fix."""

    @classmethod
    def from_open(cls, path: str, error: OSError) -> "KvmUnavailable":
        """Explain why opening ``path`` (normally /dev/kvm) failed."""
        fixes = {
            errno.ENOENT: (
                "does not exist: load the module (modprobe kvm_intel), enable VT-x in the firmware,"
                " or enable nested virtualization for this VM"
            ),
            errno.EACCES: 'permission denied: add yourself to its group (usermod -aG kvm "$USER")',
            errno.EPERM: "not permitted: the container needs the device (--device /dev/kvm)",
            errno.ENODEV: "has no driver: load the module (modprobe kvm_intel)",
            errno.ENXIO: "has no driver: load the module (modprobe kvm_intel)",
            errno.EBUSY: "is busy: another hypervisor (VirtualBox, VMware) holds the CPU",
        }
        fix = fixes.get(error.errno or 0, str(error.strerror))
        return cls(f"{path} {fix}")

"""The ioctls: one row each, with direction, number, structure and capability.

The number is computed from the row as the kernel's ``_IOC`` macro does it: direction in bits
31:30, size in 29:16, type 0xAE in 15:8, number in 7:0. ``tests/kvm/test_kvm_uapi.py`` compares
every row with the kernel's headers.
"""

from kvmnest.kvm.caps import Cap
from kvmnest.kvm.native import CData, ffi

_KVMIO = 0xAE
_DIRECTIONS = {"": 0, "W": 1, "R": 2, "WR": 3}


class Ioctl:
    """One row: ``name``, request ``code``, ``struct`` ("" for none) and ``cap`` (or None).

    ``pointer`` is the cffi type to allocate with ``ffi.new``, None without a structure.
    """

    __slots__ = ("cap", "code", "name", "pointer", "struct")

    def __init__(
        self, name: str, direction: str, number: int, struct: str = "", cap: Cap | None = None
    ) -> None:
        size = ffi.sizeof(struct) if struct else 0
        self.name = name
        self.code = _DIRECTIONS[direction] << 30 | size << 16 | _KVMIO << 8 | number
        self.struct = struct
        self.cap = cap
        self.pointer: CData = ffi.typeof(f"{struct} *") if struct else None

    def __repr__(self) -> str:
        return self.name


# On /dev/kvm.
GET_API_VERSION = Ioctl("KVM_GET_API_VERSION", "", 0x00)
CREATE_VM = Ioctl("KVM_CREATE_VM", "", 0x01)
GET_MSR_INDEX_LIST = Ioctl("KVM_GET_MSR_INDEX_LIST", "WR", 0x02, "struct kvm_msr_list")
CHECK_EXTENSION = Ioctl("KVM_CHECK_EXTENSION", "", 0x03)
GET_VCPU_MMAP_SIZE = Ioctl("KVM_GET_VCPU_MMAP_SIZE", "", 0x04)
GET_SUPPORTED_CPUID = Ioctl(
    "KVM_GET_SUPPORTED_CPUID", "WR", 0x05, "struct kvm_cpuid2", Cap.EXT_CPUID
)
GET_EMULATED_CPUID = Ioctl(
    "KVM_GET_EMULATED_CPUID", "WR", 0x09, "struct kvm_cpuid2", Cap.EXT_EMUL_CPUID
)
GET_MSR_FEATURE_INDEX_LIST = Ioctl(
    "KVM_GET_MSR_FEATURE_INDEX_LIST", "WR", 0x0A, "struct kvm_msr_list", Cap.GET_MSR_FEATURES
)

# On a VM.
CREATE_VCPU = Ioctl("KVM_CREATE_VCPU", "", 0x41)
GET_DIRTY_LOG = Ioctl("KVM_GET_DIRTY_LOG", "W", 0x42, "struct kvm_dirty_log")
SET_USER_MEMORY_REGION = Ioctl(
    "KVM_SET_USER_MEMORY_REGION", "W", 0x46, "struct kvm_userspace_memory_region", Cap.USER_MEMORY
)
SET_TSS_ADDR = Ioctl("KVM_SET_TSS_ADDR", "", 0x47, cap=Cap.SET_TSS_ADDR)
SET_IDENTITY_MAP_ADDR = Ioctl(
    "KVM_SET_IDENTITY_MAP_ADDR", "W", 0x48, "uint64_t", Cap.SET_IDENTITY_MAP_ADDR
)
CREATE_IRQCHIP = Ioctl("KVM_CREATE_IRQCHIP", "", 0x60, cap=Cap.IRQCHIP)
IRQ_LINE = Ioctl("KVM_IRQ_LINE", "W", 0x61, "struct kvm_irq_level", Cap.IRQCHIP)
GET_IRQCHIP = Ioctl("KVM_GET_IRQCHIP", "WR", 0x62, "struct kvm_irqchip", Cap.IRQCHIP)
SET_IRQCHIP = Ioctl("KVM_SET_IRQCHIP", "R", 0x63, "struct kvm_irqchip", Cap.IRQCHIP)
SET_GSI_ROUTING = Ioctl("KVM_SET_GSI_ROUTING", "W", 0x6A, "struct kvm_irq_routing", Cap.IRQ_ROUTING)
CREATE_PIT2 = Ioctl("KVM_CREATE_PIT2", "W", 0x77, "struct kvm_pit_config", Cap.PIT2)
SET_CLOCK = Ioctl("KVM_SET_CLOCK", "W", 0x7B, "struct kvm_clock_data", Cap.ADJUST_CLOCK)
GET_CLOCK = Ioctl("KVM_GET_CLOCK", "R", 0x7C, "struct kvm_clock_data", Cap.ADJUST_CLOCK)
GET_PIT2 = Ioctl("KVM_GET_PIT2", "R", 0x9F, "struct kvm_pit_state2", Cap.PIT_STATE2)
SET_PIT2 = Ioctl("KVM_SET_PIT2", "W", 0xA0, "struct kvm_pit_state2", Cap.PIT_STATE2)
SIGNAL_MSI = Ioctl("KVM_SIGNAL_MSI", "W", 0xA5, "struct kvm_msi", Cap.SIGNAL_MSI)
CLEAR_DIRTY_LOG = Ioctl(
    "KVM_CLEAR_DIRTY_LOG",
    "WR",
    0xC0,
    "struct kvm_clear_dirty_log",
    Cap.MANUAL_DIRTY_LOG_PROTECT2,
)
SET_MSR_FILTER = Ioctl(
    "KVM_X86_SET_MSR_FILTER", "W", 0xC6, "struct kvm_msr_filter", Cap.X86_MSR_FILTER
)

# On a VM or a vCPU.
ENABLE_CAP = Ioctl("KVM_ENABLE_CAP", "W", 0xA3, "struct kvm_enable_cap", Cap.ENABLE_CAP)
SET_TSC_KHZ = Ioctl("KVM_SET_TSC_KHZ", "", 0xA2, cap=Cap.TSC_CONTROL)
GET_TSC_KHZ = Ioctl("KVM_GET_TSC_KHZ", "", 0xA3, cap=Cap.GET_TSC_KHZ)
GET_STATS_FD = Ioctl("KVM_GET_STATS_FD", "", 0xCE, cap=Cap.BINARY_STATS_FD)
SET_DEVICE_ATTR = Ioctl("KVM_SET_DEVICE_ATTR", "W", 0xE1, "struct kvm_device_attr")
GET_DEVICE_ATTR = Ioctl("KVM_GET_DEVICE_ATTR", "W", 0xE2, "struct kvm_device_attr")

# On a vCPU (GET_MSRS also on /dev/kvm, for feature MSRs).
RUN = Ioctl("KVM_RUN", "", 0x80)
GET_REGS = Ioctl("KVM_GET_REGS", "R", 0x81, "struct kvm_regs")
SET_REGS = Ioctl("KVM_SET_REGS", "W", 0x82, "struct kvm_regs")
GET_SREGS = Ioctl("KVM_GET_SREGS", "R", 0x83, "struct kvm_sregs")
SET_SREGS = Ioctl("KVM_SET_SREGS", "W", 0x84, "struct kvm_sregs")
TRANSLATE = Ioctl("KVM_TRANSLATE", "WR", 0x85, "struct kvm_translation")
INTERRUPT = Ioctl("KVM_INTERRUPT", "W", 0x86, "struct kvm_interrupt")
GET_MSRS = Ioctl("KVM_GET_MSRS", "WR", 0x88, "struct kvm_msrs")
SET_MSRS = Ioctl("KVM_SET_MSRS", "W", 0x89, "struct kvm_msrs")
SET_SIGNAL_MASK = Ioctl("KVM_SET_SIGNAL_MASK", "W", 0x8B, "struct kvm_signal_mask")
GET_FPU = Ioctl("KVM_GET_FPU", "R", 0x8C, "struct kvm_fpu")
SET_FPU = Ioctl("KVM_SET_FPU", "W", 0x8D, "struct kvm_fpu")
GET_LAPIC = Ioctl("KVM_GET_LAPIC", "R", 0x8E, "struct kvm_lapic_state", Cap.IRQCHIP)
SET_LAPIC = Ioctl("KVM_SET_LAPIC", "W", 0x8F, "struct kvm_lapic_state", Cap.IRQCHIP)
SET_CPUID2 = Ioctl("KVM_SET_CPUID2", "W", 0x90, "struct kvm_cpuid2", Cap.EXT_CPUID)
GET_CPUID2 = Ioctl("KVM_GET_CPUID2", "WR", 0x91, "struct kvm_cpuid2", Cap.EXT_CPUID)
TPR_ACCESS_REPORTING = Ioctl(
    "KVM_TPR_ACCESS_REPORTING", "WR", 0x92, "struct kvm_tpr_access_ctl", Cap.VAPIC
)
GET_MP_STATE = Ioctl("KVM_GET_MP_STATE", "R", 0x98, "struct kvm_mp_state", Cap.MP_STATE)
SET_MP_STATE = Ioctl("KVM_SET_MP_STATE", "W", 0x99, "struct kvm_mp_state", Cap.MP_STATE)
NMI = Ioctl("KVM_NMI", "", 0x9A, cap=Cap.USER_NMI)
SET_GUEST_DEBUG = Ioctl(
    "KVM_SET_GUEST_DEBUG", "W", 0x9B, "struct kvm_guest_debug", Cap.SET_GUEST_DEBUG
)
X86_SETUP_MCE = Ioctl("KVM_X86_SETUP_MCE", "W", 0x9C, "uint64_t", Cap.MCE)
X86_GET_MCE_CAP_SUPPORTED = Ioctl("KVM_X86_GET_MCE_CAP_SUPPORTED", "R", 0x9D, "uint64_t", Cap.MCE)
X86_SET_MCE = Ioctl("KVM_X86_SET_MCE", "W", 0x9E, "struct kvm_x86_mce", Cap.MCE)
GET_VCPU_EVENTS = Ioctl("KVM_GET_VCPU_EVENTS", "R", 0x9F, "struct kvm_vcpu_events", Cap.VCPU_EVENTS)
SET_VCPU_EVENTS = Ioctl("KVM_SET_VCPU_EVENTS", "W", 0xA0, "struct kvm_vcpu_events", Cap.VCPU_EVENTS)
GET_DEBUGREGS = Ioctl("KVM_GET_DEBUGREGS", "R", 0xA1, "struct kvm_debugregs", Cap.DEBUGREGS)
SET_DEBUGREGS = Ioctl("KVM_SET_DEBUGREGS", "W", 0xA2, "struct kvm_debugregs", Cap.DEBUGREGS)
GET_XSAVE = Ioctl("KVM_GET_XSAVE", "R", 0xA4, "struct kvm_xsave", Cap.XSAVE)
SET_XSAVE = Ioctl("KVM_SET_XSAVE", "W", 0xA5, "struct kvm_xsave", Cap.XSAVE)
GET_XCRS = Ioctl("KVM_GET_XCRS", "R", 0xA6, "struct kvm_xcrs", Cap.XCRS)
SET_XCRS = Ioctl("KVM_SET_XCRS", "W", 0xA7, "struct kvm_xcrs", Cap.XCRS)
KVMCLOCK_CTRL = Ioctl("KVM_KVMCLOCK_CTRL", "", 0xAD, cap=Cap.KVMCLOCK_CTRL)
SMI = Ioctl("KVM_SMI", "", 0xB7, cap=Cap.X86_SMM)
GET_NESTED_STATE = Ioctl(
    "KVM_GET_NESTED_STATE", "WR", 0xBE, "struct kvm_nested_state", Cap.NESTED_STATE
)
SET_NESTED_STATE = Ioctl(
    "KVM_SET_NESTED_STATE", "W", 0xBF, "struct kvm_nested_state", Cap.NESTED_STATE
)
GET_SREGS2 = Ioctl("KVM_GET_SREGS2", "R", 0xCC, "struct kvm_sregs2", Cap.SREGS2)
SET_SREGS2 = Ioctl("KVM_SET_SREGS2", "W", 0xCD, "struct kvm_sregs2", Cap.SREGS2)
GET_XSAVE2 = Ioctl("KVM_GET_XSAVE2", "R", 0xCF, "struct kvm_xsave", Cap.XSAVE2)

"""C declarations of the kernel interface, and the generator of ``kvmnest/kvm/_abi.py``.

The declarations follow the kernel's uapi headers (``linux/kvm.h``, ``asm/kvm.h``) in names and
layout; ``tests/kvm/test_kvm_uapi.py`` compares every size, offset and ioctl number with them.
cffi compiles the text ahead of time (out-of-line, ABI mode): no C compiler is involved, and
importing the result needs neither pycparser nor parsing.
"""

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

STATE = """
struct kvm_regs {
    uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp;
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
    uint64_t rip, rflags;
};
struct kvm_segment {
    uint64_t base;
    uint32_t limit;
    uint16_t selector;
    uint8_t type, present, dpl, db, s, l, g, avl, unusable, padding;
};
struct kvm_dtable { uint64_t base; uint16_t limit; uint16_t padding[3]; };
struct kvm_sregs {
    struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt;
    struct kvm_dtable gdt, idt;
    uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base;
    uint64_t interrupt_bitmap[4];
};
struct kvm_sregs2 {
    struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt;
    struct kvm_dtable gdt, idt;
    uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base;
    uint64_t flags;
    uint64_t pdptrs[4];
};
struct kvm_fpu {
    uint8_t fpr[8][16];
    uint16_t fcw, fsw;
    uint8_t ftwx, pad1;
    uint16_t last_opcode;
    uint64_t last_ip, last_dp;
    uint8_t xmm[16][16];
    uint32_t mxcsr, pad2;
};
struct kvm_xsave { uint32_t region[1024]; uint32_t extra[]; };
struct kvm_xcr { uint32_t xcr, reserved; uint64_t value; };
struct kvm_xcrs {
    uint32_t nr_xcrs, flags;
    struct kvm_xcr xcrs[16];
    uint64_t padding[16];
};
struct kvm_debugregs { uint64_t db[4]; uint64_t dr6, dr7, flags; uint64_t reserved[9]; };
struct kvm_vcpu_events {
    struct { uint8_t injected, nr, has_error_code, pending; uint32_t error_code; } exception;
    struct { uint8_t injected, nr, soft, shadow; } interrupt;
    struct { uint8_t injected, pending, masked, pad; } nmi;
    uint32_t sipi_vector, flags;
    struct { uint8_t smm, pending, smm_inside_nmi, latched_init; } smi;
    struct { uint8_t pending; } triple_fault;
    uint8_t reserved[26];
    uint8_t exception_has_payload;
    uint64_t exception_payload;
};
struct kvm_mp_state { uint32_t mp_state; };
struct kvm_lapic_state { uint8_t regs[1024]; };
struct kvm_msr_entry { uint32_t index, reserved; uint64_t data; };
struct kvm_msrs { uint32_t nmsrs, pad; struct kvm_msr_entry entries[]; };
struct kvm_msr_list { uint32_t nmsrs; uint32_t indices[]; };
struct kvm_cpuid_entry2 {
    uint32_t function, index, flags, eax, ebx, ecx, edx;
    uint32_t padding[3];
};
struct kvm_cpuid2 { uint32_t nent, padding; struct kvm_cpuid_entry2 entries[]; };
struct kvm_vmx_nested_state_hdr {
    uint64_t vmxon_pa, vmcs12_pa;
    struct { uint16_t flags; } smm;
    uint16_t pad;
    uint32_t flags;
    uint64_t preemption_timer_deadline;
};
struct kvm_svm_nested_state_hdr { uint64_t vmcb_pa; };
struct kvm_nested_state {
    uint16_t flags, format;
    uint32_t size;
    union {
        struct kvm_vmx_nested_state_hdr vmx;
        struct kvm_svm_nested_state_hdr svm;
        uint8_t pad[120];
    } hdr;
    uint8_t data[];
};
struct kvm_guest_debug_arch { uint64_t debugreg[8]; };
struct kvm_guest_debug { uint32_t control, pad; struct kvm_guest_debug_arch arch; };
struct kvm_translation {
    uint64_t linear_address, physical_address;
    uint8_t valid, writeable, usermode;
    uint8_t pad[5];
};
struct kvm_interrupt { uint32_t irq; };
struct kvm_signal_mask { uint32_t len; uint8_t sigset[]; };
struct kvm_tpr_access_ctl { uint32_t enabled, flags; uint32_t reserved[8]; };
struct kvm_device_attr { uint32_t flags, group; uint64_t attr, addr; };
struct kvm_x86_mce {
    uint64_t status, addr, misc, mcg_status;
    uint8_t bank;
    uint8_t pad1[7];
    uint64_t pad2[3];
};
"""

MACHINE = """
struct kvm_userspace_memory_region {
    uint32_t slot, flags;
    uint64_t guest_phys_addr, memory_size, userspace_addr;
};
struct kvm_dirty_log { uint32_t slot, padding1; union { void *dirty_bitmap; uint64_t padding2; }; };
struct kvm_clear_dirty_log {
    uint32_t slot, num_pages;
    uint64_t first_page;
    union { void *dirty_bitmap; uint64_t padding2; };
};
struct kvm_enable_cap { uint32_t cap, flags; uint64_t args[4]; uint8_t pad[64]; };
struct kvm_irq_level { union { uint32_t irq; int32_t status; }; uint32_t level; };
struct kvm_pic_state {
    uint8_t last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll;
    uint8_t special_mask, init_state, auto_eoi, rotate_on_auto_eoi;
    uint8_t special_fully_nested_mode, init4, elcr, elcr_mask;
};
struct kvm_ioapic_state {
    uint64_t base_address;
    uint32_t ioregsel, id, irr, pad;
    uint64_t redirtbl[24];
};
struct kvm_irqchip {
    uint32_t chip_id, pad;
    union { char dummy[512]; struct kvm_pic_state pic; struct kvm_ioapic_state ioapic; } chip;
};
struct kvm_pit_config { uint32_t flags; uint32_t pad[15]; };
struct kvm_pit_channel_state {
    uint32_t count;
    uint16_t latched_count;
    uint8_t count_latched, status_latched, status, read_state, write_state, write_latch;
    uint8_t rw_mode, mode, bcd, gate;
    int64_t count_load_time;
};
struct kvm_pit_state2 {
    struct kvm_pit_channel_state channels[3];
    uint32_t flags;
    uint32_t reserved[9];
};
struct kvm_clock_data {
    uint64_t clock;
    uint32_t flags, pad0;
    uint64_t realtime, host_tsc;
    uint32_t pad[4];
};
struct kvm_msi {
    uint32_t address_lo, address_hi, data, flags, devid;
    uint8_t pad[12];
};
struct kvm_irq_routing_irqchip { uint32_t irqchip, pin; };
struct kvm_irq_routing_msi {
    uint32_t address_lo, address_hi, data;
    union { uint32_t pad; uint32_t devid; };
};
struct kvm_irq_routing_entry {
    uint32_t gsi, type, flags, pad;
    union {
        struct kvm_irq_routing_irqchip irqchip;
        struct kvm_irq_routing_msi msi;
        uint32_t pad[8];
    } u;
};
struct kvm_irq_routing { uint32_t nr, flags; struct kvm_irq_routing_entry entries[]; };
struct kvm_msr_filter_range { uint32_t flags, nmsrs, base; uint8_t *bitmap; };
struct kvm_msr_filter { uint32_t flags; struct kvm_msr_filter_range ranges[16]; };
struct kvm_stats_header {
    uint32_t flags, name_size, num_desc, id_offset, desc_offset, data_offset;
};
struct kvm_stats_desc {
    uint32_t flags;
    int16_t exponent;
    uint16_t size;
    uint32_t offset, bucket_size;
    char name[];
};
"""

RUN = """
struct kvm_debug_exit_arch { uint32_t exception, pad; uint64_t pc, dr6, dr7; };
struct kvm_hyperv_exit {
    uint32_t type, pad1;
    union {
        struct { uint32_t msr, pad2; uint64_t control, evt_page, msg_page; } synic;
        struct { uint64_t input, result; uint64_t params[2]; } hcall;
        struct {
            uint32_t msr, pad2;
            uint64_t control, status, send_page, recv_page, pending_page;
        } syndbg;
    } u;
};
struct kvm_xen_exit {
    uint32_t type;
    union {
        struct { uint32_t longmode, cpl; uint64_t input, result; uint64_t params[6]; } hcall;
    } u;
};
struct kvm_sync_regs {
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_vcpu_events events;
};
struct kvm_run {
    uint8_t request_interrupt_window, immediate_exit;
    uint8_t padding1[6];
    uint32_t exit_reason;
    uint8_t ready_for_interrupt_injection, if_flag;
    uint16_t flags;
    uint64_t cr8, apic_base;
    union {
        struct { uint64_t hardware_exit_reason; } hw;
        struct { uint64_t hardware_entry_failure_reason; uint32_t cpu; } fail_entry;
        struct { uint32_t exception, error_code; } ex;
        struct {
            uint8_t direction, size;
            uint16_t port;
            uint32_t count;
            uint64_t data_offset;
        } io;
        struct { struct kvm_debug_exit_arch arch; } debug;
        struct { uint64_t phys_addr; uint8_t data[8]; uint32_t len; uint8_t is_write; } mmio;
        struct {
            uint64_t nr;
            uint64_t args[6];
            uint64_t ret;
            uint32_t longmode, pad;
        } hypercall;
        struct { uint64_t rip; uint32_t is_write, pad; } tpr_access;
        struct { uint32_t suberror, ndata; uint64_t data[16]; } internal;
        struct { uint32_t type, ndata; uint64_t data[16]; } system_event;
        struct { uint8_t vector; } eoi;
        struct kvm_hyperv_exit hyperv;
        struct { uint8_t error; uint8_t pad[7]; uint32_t reason, index; uint64_t data; } msr;
        struct kvm_xen_exit xen;
        struct { uint32_t flags; } notify;
        struct { uint64_t flags, gpa, size; } memory_fault;
        char padding[256];
    };
    uint64_t kvm_valid_regs, kvm_dirty_regs;
    union { struct kvm_sync_regs regs; char padding[2048]; } s;
};
"""

LIBC = """
struct sigaction {
    void *sa_handler;
    unsigned long sa_mask[16];
    int sa_flags;
    void (*sa_restorer)(void);
};
int ioctl(int fd, unsigned long request, void *arg);
int sigaction(int signum, const struct sigaction *act, struct sigaction *old);
int tgkill(int tgid, int tid, int sig);
int abs(int value);
"""

CDEF = STATE + MACHINE + RUN + LIBC

# Written into _abi.py, so that a stale one is named instead of corrupting memory.
FINGERPRINT = zlib.crc32(CDEF.encode())

_HEADER = "# Generated by kvmnest/kvm/cdef.py: do not edit.\n# mypy: ignore-errors\n# ruff: noqa\n"


def generate(output: "Path | None" = None) -> "Path":
    """Write the compiled declarations to ``output`` (atomically) and return its path.

    Default: ``_abi.py`` next to this file. Needs cffi and pycparser, no C compiler. Raises
    OSError if the file cannot be written.
    """
    # Not at the top: every start of the program imports this file for its fingerprint.
    from contextlib import redirect_stdout
    from pathlib import Path

    from cffi import FFI

    output = output or Path(__file__).with_name("_abi.py")
    builder = FFI()
    builder.cdef(CDEF)
    builder.set_source("kvmnest.kvm._abi", None)
    scratch = output.with_name(f".{output.name}.new")
    try:
        with redirect_stdout(None):  # cffi reports the name of the scratch file
            builder.emit_python_code(str(scratch))
        text = scratch.read_text()
        scratch.write_text(f"{_HEADER}{text}FINGERPRINT = {FINGERPRINT}\n")
        scratch.replace(output)
    finally:
        scratch.unlink(missing_ok=True)
    return output


if __name__ == "__main__":
    print(generate())

"""The declarations against the kernel's own headers, through the C compiler."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmnest.kvm import exits, ioctls, kick, vm
from kvmnest.kvm.caps import Cap
from kvmnest.kvm.exit_codes import ExitCode
from kvmnest.kvm.native import CData, ffi

HEADERS = ("linux/kvm.h", "asm/kvm.h")

# Members that headers older than the one they came with do not have: member -> a macro that
# came at the same time.
NEWER = {"memory_fault": "KVM_EXIT_MEMORY_FAULT"}

EXITS = {
    "KVM_EXIT_UNKNOWN": exits.UnknownExit,
    "KVM_EXIT_EXCEPTION": exits.ExceptionExit,
    "KVM_EXIT_IO": exits.IoExit,
    "KVM_EXIT_HYPERCALL": exits.HypercallExit,
    "KVM_EXIT_DEBUG": exits.DebugExit,
    "KVM_EXIT_HLT": exits.HltExit,
    "KVM_EXIT_MMIO": exits.MmioExit,
    "KVM_EXIT_IRQ_WINDOW_OPEN": exits.IrqWindowOpenExit,
    "KVM_EXIT_SHUTDOWN": exits.ShutdownExit,
    "KVM_EXIT_FAIL_ENTRY": exits.FailEntryExit,
    "KVM_EXIT_INTR": exits.IntrExit,
    "KVM_EXIT_SET_TPR": exits.SetTprExit,
    "KVM_EXIT_TPR_ACCESS": exits.TprAccessExit,
    "KVM_EXIT_NMI": exits.NmiExit,
    "KVM_EXIT_INTERNAL_ERROR": exits.InternalErrorExit,
    "KVM_EXIT_SYSTEM_EVENT": exits.SystemEventExit,
    "KVM_EXIT_IOAPIC_EOI": exits.EoiExit,
    "KVM_EXIT_HYPERV": exits.HypervExit,
    "KVM_EXIT_X86_RDMSR": exits.RdmsrExit,
    "KVM_EXIT_X86_WRMSR": exits.WrmsrExit,
    "KVM_EXIT_DIRTY_RING_FULL": exits.DirtyRingFullExit,
    "KVM_EXIT_AP_RESET_HOLD": exits.ApResetHoldExit,
    "KVM_EXIT_X86_BUS_LOCK": exits.BusLockExit,
    "KVM_EXIT_XEN": exits.XenExit,
    "KVM_EXIT_NOTIFY": exits.NotifyExit,
    "KVM_EXIT_MEMORY_FAULT": exits.MemoryFaultExit,
}

# Exit reasons of other architectures, and macros with the same prefix that are no exit reason.
NO_X86_REASON = re.compile(
    "KVM_EXIT_(S390_|DCR|OSI|PAPR_|WATCHDOG|EPR|ARM_|RISCV_|LOONGARCH_|IO_|HYPERV_|XEN_|TDX|SNP)"
)

CONSTANTS = {
    "KVM_EXIT_IO_IN": exits.IO_IN,
    "KVM_EXIT_IO_OUT": exits.IO_OUT,
    **{f"KVM_EXIT_{code.name}": code for code in ExitCode},
    "KVM_MSR_EXIT_REASON_INVAL": exits.MSR_REASON_INVAL,
    "KVM_MSR_EXIT_REASON_UNKNOWN": exits.MSR_REASON_UNKNOWN,
    "KVM_MSR_EXIT_REASON_FILTER": exits.MSR_REASON_FILTER,
    "KVM_MEM_LOG_DIRTY_PAGES": vm.MEM_LOG_DIRTY_PAGES,
    "KVM_MEM_READONLY": vm.MEM_READONLY,
    "SA_RESTART": kick.SA_RESTART,
}


def rows() -> list[ioctls.Ioctl]:
    return [row for row in vars(ioctls).values() if isinstance(row, ioctls.Ioctl)]


def structs() -> list[str]:
    return [name for name in ffi.list_types()[1] if not name.startswith("$")]


def members(kind: CData, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """(path, offset, size; -1 for a flexible array) of every member, into anonymous structs."""
    for name, field in kind.fields:
        path = f"{prefix}{name}"
        flexible = field.type.kind == "array" and field.type.length is None
        anonymous = field.type.kind in ("struct", "union") and "$" in field.type.cname
        if name:
            yield path, field.offset, -1 if flexible else ffi.sizeof(field.type)
        if anonymous:
            inner = f"{path}." if name else prefix
            for sub, offset, size in members(field.type, inner):
                yield sub, field.offset + offset, size


def expected() -> dict[str, tuple[str, str, int]]:
    """Label -> (macro that must exist, C expression, our value)."""
    table = {}
    for row in rows():
        table[row.name] = (row.name, row.name, row.code)
    for cap in Cap:
        table[f"KVM_CAP_{cap.name}"] = (f"KVM_CAP_{cap.name}",) * 2 + (int(cap),)
    for name, value in CONSTANTS.items():
        table[f"constant {name}"] = (name, name, value)
    for struct in structs():
        table[f"sizeof {struct}"] = ("", f"sizeof(struct {struct})", ffi.sizeof(f"struct {struct}"))
        for path, offset, size in members(ffi.typeof(f"struct {struct}")):
            needs = NEWER.get(path.split(".")[0], "")
            place = f"struct {struct}, {path}"
            table[place] = (needs, f"offsetof({place})", offset)
            if size >= 0:
                expression = f"sizeof(((struct {struct} *)0)->{path})"
                table[f"sizeof {place}"] = (needs, expression, size)
    return table


@pytest.fixture(scope="module")
def header_values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C program built against the headers says; members that they lack are left out."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler")
    lines = ["#include <stdio.h>", "#include <stddef.h>", "#include <signal.h>"]
    lines += [f"#include <{header}>" for header in HEADERS]
    lines.append("int main(void) {")
    for label, (needs, expression, _) in expected().items():
        line = f'printf("{label}=%llu\\n", (unsigned long long)({expression}));'
        lines += [f"#ifdef {needs}", line, "#endif"] if needs else [line]
    lines.append("return 0; }")
    directory = tmp_path_factory.mktemp("uapi")
    source = directory / "layout.c"
    source.write_text("\n".join(lines))
    probe = subprocess.run(
        [compiler, "-E", "-x", "c", "-", "-o", "/dev/null"],
        input="".join(f"#include <{header}>\n" for header in HEADERS),
        capture_output=True,
        text=True,
    )
    if probe.returncode:
        pytest.skip(f"no kernel headers (linux-libc-dev): {probe.stderr.splitlines()[0]}")
    built = subprocess.run(
        [compiler, "-o", str(directory / "layout"), str(source)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    output = subprocess.run([str(directory / "layout")], capture_output=True, text=True, check=True)
    pairs = (line.rsplit("=", 1) for line in output.stdout.splitlines())
    return {label: int(value) for label, value in pairs}


def test_every_number_size_and_offset_is_the_headers(header_values: dict[str, int]) -> None:
    ours = {label: value for label, (_, _, value) in expected().items()}
    differing = {
        label: (ours[label], theirs)
        for label, theirs in header_values.items()
        if ours[label] != theirs
    }
    assert differing == {}
    # Nothing but what is newer than the headers was left out.
    absent = ours.keys() - header_values.keys()
    assert len(absent) < len(ours) // 10, sorted(absent)
    assert not any(label.startswith("sizeof kvm_") for label in absent)


def test_exit_reasons_are_the_headers() -> None:
    header = Path("/usr/include/linux/kvm.h")
    if not header.exists():
        pytest.skip("no kernel headers (linux-libc-dev)")
    matches = re.finditer(r"#define (KVM_EXIT_\w+)\s+(\d+)", header.read_text())
    reasons = {m[1]: int(m[2]) for m in matches if not NO_X86_REASON.match(m[1])}
    # Each reason of x86 is known, and decoded to its class.
    assert reasons.keys() <= EXITS.keys(), reasons.keys() - EXITS.keys()
    run = ffi.new("struct kvm_run *")
    for name, number in reasons.items():
        assert type(exits.DECODERS[number](run, bytes(4096))) is EXITS[name], name


def test_every_ioctl_row_is_used() -> None:
    source = "".join(
        path.read_text()
        for path in Path(ioctls.__file__).parent.glob("*.py")
        if path.name != "ioctls.py"
    )
    names = [name for name, row in vars(ioctls).items() if isinstance(row, ioctls.Ioctl)]
    assert [name for name in names if f"ioctls.{name}" not in source] == []

"""Coverage of a small source file, made without a kernel."""

from collections.abc import Callable

import pytest

from kvmnest.coverage.build import Built, Source
from kvmnest.coverage.record import Record
from kvmnest.coverage.record import Source as Covered

NESTED = "arch/x86/kvm/vmx/nested.c"
KERNEL, VERSION = "7.3.4-amd64", "7.3.4-1"


@pytest.fixture
def record() -> Callable[..., Record]:
    """Makes the record of a file with two functions and six blocks, from what reached each."""

    def make(*first: str, kernel: str = KERNEL, lines: tuple[int, ...] = ()) -> Record:
        functions = [(10, "enter"), (20, "leave")]
        blocks = [*lines] or [11, 13, 13, 15, 21, 22]
        return Record(kernel, VERSION, {NESTED: Covered(functions, blocks, [*first])})

    return make


@pytest.fixture
def built(tmp_path) -> Built:
    """Modules whose blocks are at known places: two in .text, one in .init.text, one in kvm."""
    places = [
        ("kvm_intel", ".text", 0x10),
        ("kvm_intel", ".text", 0x20),
        ("kvm_intel", ".init.text", 0x10),
    ]
    sources = {
        NESTED: Source([11, 13, 21], [(10, "enter"), (20, "leave")], places),
        "arch/x86/kvm/x86.c": Source([5], [(4, "f")], [("kvm", ".text", 0x10)]),
    }
    return Built(tmp_path, KERNEL, VERSION, sources)

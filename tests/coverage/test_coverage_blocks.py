"""Blocks as gcc and the module's relocations have them."""

import shutil
import subprocess

import pytest

from kvmnest.coverage import blocks
from kvmnest.coverage.build import _FLAGS

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")

SOURCE = """\
void one(void);
int in_header(int x);

int enter(int x)
{
        if (x)
                one();
        return in_header(x);
}

__attribute__((section(".init.text"))) void start(int x)
{
        if (x)
                one();
}
"""
HEADER = """\
static inline int twice(int x)
{
        return x ? one(), 2 : 3;
}
"""


@pytest.fixture
def module(tmp_path):
    """An object file, with two code sections, of a source below arch/x86/kvm."""
    folder = tmp_path / "tree/arch/x86/kvm"
    (folder / "vmx").mkdir(parents=True)
    (folder / "vmx/a.c").write_text(SOURCE + '#include "a.h"\nint all(int x)\n{ return twice(x); }')
    (folder / "vmx/a.h").write_text(HEADER)
    argv = ["gcc", "-O2", *_FLAGS.split(), "-c", "vmx/a.c", "-o", str(tmp_path / "a.ko")]
    subprocess.run(argv, cwd=folder, check=True)
    return tmp_path / "a.ko"


def test_each_block_has_its_line_in_its_section(module):
    found = blocks.read(module)
    places = {(b.section, b.file.rpartition("/")[2], b.line) for b in found.blocks}
    assert {(".text", "a.c", 7), (".text", "a.c", 8), (".init.text", "a.c", 14)} <= places
    # Both sections begin at address 0: a line of the one must not show up in the other.
    assert {line for section, _, line in places if section == ".init.text"} <= {12, 13, 14, 15}
    assert {b.file for b in found.blocks} == {"arch/x86/kvm/vmx/a.c", "arch/x86/kvm/vmx/a.h"}
    assert found.functions["arch/x86/kvm/vmx/a.c"] == [(4, "enter"), (11, "start"), (17, "all")]
    assert found.functions["arch/x86/kvm/vmx/a.h"] == [(1, "twice")]


def test_every_call_of_the_collector_is_a_block(module):
    told = subprocess.run(
        ["objdump", "-dr", str(module)], capture_output=True, text=True, check=True
    ).stdout
    calls = [line for line in told.splitlines() if "R_X86_64_" in line and blocks.CALLBACK in line]
    assert len(calls) == len(blocks.read(module).blocks)
    # None is a jump: its return address would be one of the caller's.
    before = [a for a, b in zip(told.splitlines(), told.splitlines()[1:], strict=False)
              if b in calls]  # fmt: skip
    assert all("call" in line for line in before)

"""Coverage for real: modules built from Debian's source, a case, a command, and both joined."""

import shutil

import pytest

from kvmnest.cli.main import main
from kvmnest.coverage import record as records

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bochs") is None, reason="bochs is not installed"),
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
]

NESTED = "arch/x86/kvm/vmx/nested.c"
# The VM is made in the child; what follows is a page that is there only in the lab.
OPENS_KVM = "import fcntl; fcntl.ioctl(open('/dev/kvm'), 0xAE01, 0)"


def test_a_case_and_a_command(tmp_path, capsys):
    """VMXON outside of CPL 0 reaches the #GP of handle_vmxon, and nothing of VM entry."""
    data, common = tmp_path / "c.json", ["--kernel", "newest", "--source", "vmx/nested.c"]
    to = ["--data", str(data), "--pages", str(tmp_path / "pages")]
    run = ["coverage", "run", "-j1", "-q", *common, *to, "test_vmxon.py::test_vmxon_at_cpl_3"]
    assert main(run) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert f"{NESTED}  lines " in said
    reached = records.load(data).sources[NESTED].by_function()
    assert "test_vmxon.py::test_vmxon_at_cpl_3" in {*reached["handle_vmxon"].values()}
    assert not any(reached["nested_vmx_run"].values())
    page = (tmp_path / "pages/arch-x86-kvm-vmx-nested.c.html").read_text()
    assert "static int handle_vmxon(" in page
    assert "<td class=by>test_vmxon.py::test_vmxon_at_cpl_3</td>" in page
    before = sum(map(bool, records.load(data).sources[NESTED].first))
    command = ["coverage", "command", *common, *to[:2], "--add", "--", "python3", "-c", OPENS_KVM]
    assert main(command) == 0, capsys.readouterr()
    # It reaches less than the case, and adds nothing.
    assert sum(map(bool, records.load(data).sources[NESTED].first)) == before

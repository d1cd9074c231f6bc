"""kvmnest found in the lab: a defect as it is and mended, and a fix that does not fit a kernel."""

import json

from kvmnest.cli.main import main
from kvmnest.found import record

DEFECT = "entry-length-overwritten"  # its fix fits old kernels, too


def test_verify_and_build(capsys, tmp_path):
    path = tmp_path / "shown.json"
    assert main(["found", "--verify", DEFECT, "--json", "--record", str(path)]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["stock"]["verdict"] == "VULNERABLE"
    assert told["together"]["verdict"] == told["alone"]["verdict"] == "FIXED"
    (shown,) = record.load(path)[DEFECT].values()
    assert shown.verdicts == record.NEEDED
    assert shown.line.startswith("arch/x86/kvm/vmx/nested.c:")
    assert main(["found", "--build", str(tmp_path / "fixed"), DEFECT]) == 0
    assert (tmp_path / "fixed/kvm.ko").stat().st_size > 100_000
    assert "with 1 fix\n" in capsys.readouterr().out


def test_a_fix_that_does_not_fit(capsys, tmp_path):
    """Linux 6.1 has no vmx_is_io_intercepted()."""
    assert main(["found", "--build", str(tmp_path / "fixed"), "io-exit-direction"]) == 1
    error = capsys.readouterr().err
    assert "do not fit 6.1" in error
    assert "vmx_is_io_intercepted" in error
    assert not (tmp_path / "fixed").exists()

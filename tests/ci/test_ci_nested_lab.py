"""ci/nested on a real kvm_intel: in the lab, with a VM that is in the way."""

import shutil
from pathlib import Path

import pytest

from kvmnest.lab.machine import Lab

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("bochs") is None, reason="bochs is not installed")

# The guest has no kmod: its two calls, by the system calls that kmod makes.
_RMMOD = b"""#!/usr/bin/python3
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(176, sys.argv[1].encode(), os.O_NONBLOCK):
    sys.exit(os.strerror(ctypes.get_errno()))
"""
_MODPROBE = b"""#!/usr/bin/python3
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open("/modules/" + sys.argv[1] + ".ko", os.O_RDONLY)
if libc.syscall(313, fd, " ".join(sys.argv[2:]).encode(), 0):
    sys.exit(os.strerror(ctypes.get_errno()))
"""
# In this process: the guest would need seconds to start another Python for each call.
_COMMAND = """
import contextlib, fcntl, io, os, sys
from importlib.machinery import SourceFileLoader
PARAMETERS = "/sys/module/kvm_intel/parameters/"
nested = sys.modules["nested"] = type(sys)("nested")
SourceFileLoader("nested", "/root/nested").exec_module(nested)

def call(*argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = nested.main(argv)
    shown = " ".join(f"{n}=" + open(PARAMETERS + n).read().strip() for n in ("nested", "ept"))
    print(code, shown, out.getvalue().strip(), err.getvalue().strip(), sep="|")

call("check")
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
os.close(kvm)
call("on")
os.close(vm)
call("on")
call("check")
call("restore")
"""


def test_a_real_kvm_intel_is_reloaded_and_put_back():
    out = bytearray()
    lab = Lab(kvm_params={"nested": "0", "ept": "0"})
    status = lab.run(
        ["python3", "-c", _COMMAND],
        on_output=out.extend,
        files={
            "/root/nested": (ROOT / "ci" / "nested").read_bytes(),
            "/usr/bin/rmmod": _RMMOD,
            "/usr/bin/modprobe": _MODPROBE,
        },
    )
    lines = out.decode().splitlines()
    assert status == 0, lines
    in_use = "in use: python3 (pid"
    assert len(lines) == 5, lines
    assert lines[0] == "3|nested=N ept=N||nested: kvm_intel has nested=N: sudo ci/nested on"
    assert lines[1].startswith("3|nested=N ept=N||nested: kvm_intel is " + in_use)
    assert lines[2] == "0|nested=Y ept=N|nested: reloaded kvm_intel with nested=1 (was N)|"
    assert lines[3] == "0|nested=Y ept=N|nested: kvm_intel has nested=Y|"
    assert lines[4] == "0|nested=N ept=N|nested: kvm_intel is as it was: nested=N|"

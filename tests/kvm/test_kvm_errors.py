"""Error messages: the ioctl, the object, errno and what to do."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvmnest
from kvmnest.errors import KvmnestError
from kvmnest.kvm import Kvm, KvmError, KvmMsrError, KvmUnavailable, Vm, cdef, ioctls
from kvmnest.kvm.base import KvmObject
from kvmnest.kvm.errors import HINTED

PACKAGE = Path(kvmnest.__file__).parent


def test_message_names_everything() -> None:
    error = KvmError("KVM_SET_SREGS", "vcpu 3", errno.EINVAL)
    assert str(error).startswith("KVM_SET_SREGS on vcpu 3 failed: EINVAL (Invalid argument): ")
    assert "CR0.PG without PE" in str(error)
    assert (error.errno, error.ioctl, error.target) == (errno.EINVAL, "KVM_SET_SREGS", "vcpu 3")
    assert isinstance(error, OSError)
    assert isinstance(error, KvmnestError)
    assert error.exit_code == 3


def test_message_without_hint_and_with_unknown_errno() -> None:
    assert str(KvmError("KVM_NMI", "vcpu 0", errno.EDOM)) == (
        "KVM_NMI on vcpu 0 failed: EDOM (Numerical argument out of domain)"
    )
    assert "KVM_NMI on vcpu 0 failed: 999 (" in str(KvmError("KVM_NMI", "vcpu 0", 999))


def test_msr_error_names_the_index() -> None:
    error = KvmMsrError("KVM_GET_MSRS", "vcpu 0", 0x480, 2, 5)
    assert "MSR 0x480 was refused (entry 3 of 5)" in str(error)
    assert (error.index, error.done) == (0x480, 2)


def test_hints_are_for_ioctls_that_exist() -> None:
    names = {row.name for row in vars(ioctls).values() if isinstance(row, ioctls.Ioctl)}
    assert names >= HINTED


def test_a_descriptor_that_is_not_kvms() -> None:
    null = KvmObject(os.open("/dev/null", os.O_RDWR), "null")
    with null, pytest.raises(KvmError, match="KVM_GET_API_VERSION on null failed: ENOTTY"):
        null.ioctl(ioctls.GET_API_VERSION)


def test_closed_object(kvm: Kvm) -> None:
    vm = kvm.create_vm()
    name = vm.name
    vm.close()
    vm.close()
    assert vm.closed
    with pytest.raises(KvmError, match=f"KVM_CHECK_EXTENSION on {name} .*EBADF.*{name} is closed"):
        vm.check_extension(0)
    with pytest.raises(KvmError, match="is closed"):
        vm.fileno()


def test_missing_device() -> None:
    with pytest.raises(KvmUnavailable, match="/dev/nothing does not exist: load the module"):
        Kvm("/dev/nothing")


def test_device_that_is_not_kvm() -> None:
    with pytest.raises(KvmUnavailable, match="/dev/null is not KVM"):
        Kvm("/dev/null")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EACCES, "usermod -aG kvm"),
        (errno.EPERM, "--device /dev/kvm"),
        (errno.ENODEV, "modprobe kvm_intel"),
        (errno.EBUSY, "another hypervisor"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_why_the_device_cannot_be_opened(number: int, text: str) -> None:
    error = KvmUnavailable.from_open("/dev/kvm", OSError(number, os.strerror(number)))
    assert text in str(error)
    assert "\n" not in str(error)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can drop its permission to /dev/kvm")
def test_no_permission(kvm: Kvm, tmp_path: Path) -> None:
    # A device of KVM's numbers that nobody but root may open, and a process that is not root.
    device = tmp_path / "kvm"
    os.mknod(device, 0o600 | 0o020000, os.stat(kvm.name).st_rdev)
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setuid(65534)
        try:
            Kvm(str(device))
        except KvmUnavailable as error:
            os._exit(0 if "permission denied" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def import_of(root: Path) -> subprocess.CompletedProcess[str]:
    code = "import kvmnest.kvm.system"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )


@pytest.fixture
def copy_of_package(tmp_path: Path) -> Path:
    pytest.importorskip("pycparser", reason="the generator needs it, the bindings do not")
    target = tmp_path / "kvmnest"
    (target / "kvm").mkdir(parents=True)
    for name in ("__init__.py", "errors.py"):
        shutil.copy(PACKAGE / name, target / name)
    for source in (PACKAGE / "kvm").glob("*.py"):
        if source.name != "_abi.py":
            shutil.copy(source, target / "kvm" / source.name)
    return tmp_path


def test_missing_declarations_say_how_to_make_them(copy_of_package: Path) -> None:
    failed = import_of(copy_of_package)
    assert failed.returncode == 1
    assert "generate it with: python -m kvmnest.kvm.cdef" in failed.stderr.splitlines()[-1]
    made = subprocess.run(
        [sys.executable, "-m", "kvmnest.kvm.cdef"],
        cwd=copy_of_package,
        capture_output=True,
        text=True,
    )
    assert made.stdout == f"{copy_of_package}/kvmnest/kvm/_abi.py\n"
    assert import_of(copy_of_package).returncode == 0
    assert [p.name for p in (copy_of_package / "kvmnest/kvm").iterdir() if "new" in p.name] == []


def test_stale_declarations_are_refused(copy_of_package: Path) -> None:
    output = cdef.generate(copy_of_package / "kvmnest/kvm/_abi.py")
    output.write_text(output.read_text().replace(str(cdef.FINGERPRINT), "1"))
    failed = import_of(copy_of_package)
    assert failed.returncode == 1
    assert "does not match kvmnest/kvm/cdef.py" in failed.stderr.splitlines()[-1]


def test_a_vcpu_of_a_closed_vm_is_closed(kvm: Kvm) -> None:
    vm: Vm = kvm.create_vm()
    vcpu = vm.create_vcpu()
    vm.close()
    for use in (vcpu.run, vcpu.get_regs, lambda: vcpu.kvm_run, vcpu.stats):
        with pytest.raises(KvmError, match="vcpu 0 is closed"):
            use()

"""The real machine's parts, with the real tools, on files that are nobody's system."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from reboot_scratch import MENU, OTHER, Scratch
from reboot_sim import HOME

from kvmnest import host
from kvmnest.bisect.probe import GOOD, Answer, Question
from kvmnest.bisect.reboot import fitness, grub, session, unit
from kvmnest.bisect.reboot.commands import CommandFailed, Commands
from kvmnest.bisect.reboot.debian_grub import DebianGrub
from kvmnest.errors import HarnessError, UsageError

needs_grub = pytest.mark.skipif(
    shutil.which("grub-reboot") is None or os.geteuid() != 0, reason="needs grub2-common and root"
)


@pytest.fixture
def machine(root, monkeypatch):
    monkeypatch.setattr(host, "kernel", lambda: HOME)
    return DebianGrub(Scratch(root), root / "state.json", root)


def grubenv(root):
    words = ["grub-editenv", root / "boot/grub/grubenv", "list"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


# --- the menu ---


def test_entries_of_a_menu():
    sub = "gnulinux-advanced-U>gnulinux"
    assert [(found.path, found.release) for found in grub.entries(MENU)] == [
        ("gnulinux-simple-U", OTHER),
        (f"{sub}-{OTHER}-recovery-U", OTHER),
        (f"{sub}-{OTHER}-advanced-U", OTHER),
        (f"{sub}-{HOME}-advanced-U", HOME),
    ]
    assert grub.entry(MENU, OTHER) == f"{sub}-{OTHER}-advanced-U"
    assert grub.entry(MENU, "6.12.0-rc1") is None
    flat = MENU.replace("submenu 'Advanced options' $menuentry_id_option", "if true; then #")
    assert grub.entry(flat, HOME) == f"gnulinux-{HOME}-advanced-U"


@pytest.mark.parametrize("line", ["save_env next_entry", 'set default="${saved_entry}"'])
def test_a_menu_that_does_not_boot_once(line):
    grub.require_one_time_choice(MENU, Path("x"))
    with pytest.raises(HarnessError, match="does not boot a kernel only once"):
        grub.require_one_time_choice(MENU.replace(line, "true"), Path("x"))


@needs_grub
def test_a_choice_for_one_boot_with_the_real_tools(machine, root):
    entry = f"gnulinux-advanced-U>gnulinux-{OTHER}-advanced-U"
    machine.choose(OTHER)
    assert grubenv(root) == [f"next_entry={entry}"]
    assert machine.still_chosen()
    machine.forget_choice()
    assert grubenv(root) == []
    assert not machine.still_chosen()
    with pytest.raises(HarnessError, match=r"grub\.cfg has no entry for 6\.0\.0"):
        machine.choose("6.0.0")


@needs_grub
def test_a_menu_by_the_real_grub_mkconfig(machine, root):
    """Installed kernels do not become the default; all is undone at the end."""
    for release in (HOME, OTHER):
        for name in ("vmlinuz", "initrd.img"):
            (root / "boot" / f"{name}-{release}").write_text("")
    try:
        machine.update_menu()
    except CommandFailed as error:
        pytest.skip(f"grub-mkconfig cannot run here: {error}")
    before = (root / "boot/grub/grub.cfg").read_text()
    subprocess.run(["grub-editenv", root / "boot/grub/grubenv", "set", "saved_entry=x"], check=True)
    assert machine.default() == "x"
    machine.prepare(HOME, ["panic=10", "kvm_intel.nested=1"])
    menu = (root / "boot/grub/grub.cfg").read_text()
    saved = machine.default()
    assert saved == grub.entry(menu, HOME)
    assert saved.count(">") == 1
    kernels = [line for line in menu.splitlines() if line.strip().startswith("linux\t")]
    assert kernels
    assert all("panic=10 kvm_intel.nested=1" in line for line in kernels)
    assert machine.has(OTHER)
    machine.choose(OTHER)
    machine.forget_choice()
    machine.remove(OTHER)
    assert not machine.has(OTHER)
    assert machine.has(HOME)
    machine.restore("x")
    assert machine.default() == "x"
    assert list((root / "etc/default/grub.d").iterdir()) == []
    (root / "boot" / f"vmlinuz-{OTHER}").write_text("")
    (root / "boot" / f"initrd.img-{OTHER}").write_text("")
    machine.update_menu()
    assert (root / "boot/grub/grub.cfg").read_text() == before
    machine.restore("")
    assert machine.default() == ""


# --- kernels ---


def test_a_package_is_installed_from_signed_archives(machine):
    assert machine.install_package("6.1.0-50-amd64") == ""
    first, second = machine._do.ran
    assert first == "dpkg --configure -a"
    assert second.startswith("apt-get -oAPT::Get::AllowUnauthenticated=false ")
    assert second.endswith("install -y --no-install-recommends linux-image-6.1.0-50-amd64")


def test_what_apt_says(machine, monkeypatch):
    machine._do.fails["apt-get"] = "E: Unable to locate package linux-image-6.1.0-1-amd64"
    assert "apt has no linux-image-6.1.0-1-amd64 any more" in machine.install_package(
        "6.1.0-1-amd64"
    )
    machine._do.fails["apt-get"] = "E: You don't have enough free space in /var/cache"
    with pytest.raises(HarnessError, match="enough free space"):
        machine.install_package("6.1.0-1-amd64")
    usage = shutil.disk_usage("/")._replace(free=5 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(HarnessError, match=r"boot has 5 MiB free.*autoremove"):
        machine.install_package("6.1.0-1-amd64")


def test_the_real_apt_knows_no_such_kernel(root):
    """apt-get's own words for a package that is not there; nothing is installed by it."""
    with pytest.raises(CommandFailed) as failed:
        Commands().run("apt-get", "-q", "install", "-s", "linux-image-6.1.0-0-amd64")
    assert "Unable to locate package" in failed.value.output


def test_a_kernel_that_was_built_is_removed_by_its_files(machine, root):
    machine.update_menu = lambda: None
    names = ("vmlinuz", "initrd.img", "config", "System.map")
    for release in (HOME, OTHER):
        for name in names:
            (root / "boot" / f"{name}-{release}").write_text("")
        (root / "lib/modules" / release / "kernel").mkdir(parents=True)
    machine.remove(OTHER)
    machine.remove(OTHER)  # the power may have failed in between
    left = sorted(path.name for path in (root / "boot").iterdir() if path.is_file())
    assert left == sorted(f"{name}-{HOME}" for name in names)
    assert [path.name for path in (root / "lib/modules").iterdir()] == [HOME]
    for release in (HOME, "", "6/../../x", "../x"):
        with pytest.raises(HarnessError, match="is not removed"):
            machine.remove(release)


def test_a_package_is_removed_alone(machine, monkeypatch):
    monkeypatch.setattr("kvmnest.bisect.reboot.debian_grub.has_traces", lambda package: True)
    machine.remove("6.1.0-50-amd64")
    (ran,) = machine._do.ran
    assert ran == "dpkg --purge --force-remove-reinstreq linux-image-6.1.0-50-amd64"


def test_traces_of_a_package():
    from kvmnest.bisect.reboot.debian_grub import has_traces

    assert has_traces("dpkg")
    assert not has_traces("linux-image-0.0.0-none")


# --- the unit ---


def test_the_unit(machine, root, monkeypatch, tmp_path):
    folder = tmp_path / 'odd "100%" $HOME \\ folder'
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    machine.install_unit(session.unit_arguments(folder))
    path = root / "etc/systemd/system" / unit.NAME
    assert machine._do.ran == [
        "systemctl daemon-reload", "systemctl enable kvmnest-bisect.service"
    ]  # fmt: skip
    # As systemd.syntax(7) and systemd.service(5) have it: %% and $$ stand for themselves.
    text = path.read_text()
    assert f"WorkingDirectory={str(folder).replace('%', '%%')}\n" in text
    state = str(folder).replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    command = text.partition("ExecStart=")[2].splitlines()[0]
    assert command.endswith(f' "--state" "{state.replace("$", "$$")}"')
    assert f'"XDG_CACHE_HOME={state}"' in text
    if shutil.which("systemd-analyze"):
        words = ["systemd-analyze", "verify", "--man=no", "--generators=no", str(path)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert unit.NAME not in done.stderr, done.stderr
        words = ["systemctl", f"--root={root}", "enable", unit.NAME]
        subprocess.run(words, check=True, capture_output=True)
        wanted = root / "etc/systemd/system/multi-user.target.wants" / unit.NAME
        assert wanted.is_symlink()
    machine.remove_unit()
    assert not path.exists()
    count = len(machine._do.ran)
    machine.remove_unit()
    assert len(machine._do.ran) == count
    with pytest.raises(UsageError, match="cannot stand in a systemd unit"):
        unit.text(["a\nb"], folder)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_a_unit_that_is_wrong_is_noticed(tmp_path):
    path = tmp_path / unit.NAME
    path.write_text(unit.text(["x"], tmp_path).replace("Type=oneshot", "Typo=oneshot"))
    words = ["systemd-analyze", "verify", "--man=no", "--generators=no", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert unit.NAME in done.stderr


# --- the machine ---


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A grub-probe that tells what we want: there is one filesystem here only."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in fitness._TOOLS:
        path = tools / tool
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{tools}")

    def say(kind, abstraction=""):
        words = f'case "$1" in *=fs) echo "{kind}";; *) echo "{abstraction}";; esac'
        (tools / "first").mkdir(exist_ok=True)
        path = tools / "first" / "grub-probe"
        path.write_text(f"#!/bin/sh\n{words}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools / 'first'}:{os.environ['PATH']}")

    return say


def problems(root, **more):
    return list(fitness.problems(root, own_kernels=more.get("own_kernels", False)))


@pytest.fixture
def fit(root, probe, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (root / "boot/grub/grubenv").touch()
    probe("ext2")
    return root


def test_a_machine_that_does(fit, machine):
    assert problems(fit) == []
    machine.check(own_kernels=True)
    assert machine.boot_id() == "1-2-3"


def test_no_entry_for_the_running_kernel(fit, machine, monkeypatch):
    monkeypatch.setattr(host, "kernel", lambda: "6.5.0-x")
    with pytest.raises(HarnessError, match=r"no entry for 6\.5\.0-x"):
        machine.check(own_kernels=False)


@pytest.mark.parametrize(
    ("kind", "abstraction"), [("btrfs", ""), ("zfs", ""), ("ext2", "lvm"), ("ext2", "diskfilter")]
)
def test_where_grub_cannot_write(fit, probe, kind, abstraction):
    probe(kind, abstraction)
    (said,) = problems(fit)
    assert f"GRUB cannot write to {fit}/boot/grub ({abstraction or kind})" in said
    probe("xfs")
    assert problems(fit) == []


def change(path, text):
    def apply(root):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text if isinstance(text, bytes) else text.encode())

    return apply


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: shutil.rmtree(root / "run/systemd/system"), "systemd is not what runs"),
        (change("run/systemd/container", "docker"), "this is a container (docker)"),
        (change("proc/cpuinfo", "flags : fpu svm\n"), "this CPU has no VMX"),
        (lambda root: (root / "boot/grub/grub.cfg").unlink(), "GRUB is not what boots"),
        (lambda root: (root / "boot/grub/grubenv").unlink(), "grub-editenv"),
        (change("sys/module/kvm_intel/refcnt", "2\n"), "kvm_intel is in use (2)"),
        (
            change(f"sys/firmware/efi/efivars/{fitness._SECURE_BOOT}", b"\x06\0\0\0\x01"),
            "Secure Boot is on",
        ),
    ],
)
def test_what_is_in_the_way(fit, spoil, said):
    spoil(fit)
    (problem,) = problems(fit, own_kernels=True)
    assert said in problem
    assert "\n" not in problem


def test_secure_boot_matters_for_kernels_of_ones_own_only(fit):
    change(f"sys/firmware/efi/efivars/{fitness._SECURE_BOOT}", b"\x06\0\0\0\x01")(fit)
    assert problems(fit) == []
    change(f"sys/firmware/efi/efivars/{fitness._SECURE_BOOT}", b"\x06\0\0\0\x00")(fit)
    assert problems(fit, own_kernels=True) == []


def test_no_root_and_no_tool(fit, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert problems(fit) == [fitness.NO_ROOT]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "grub-reboot not found: apt-get install grub2-common" in problems(fit)


# --- the case ---


def test_the_case_on_this_machine(machine, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(Question, "ask_here", lambda self: asked.append(1) or Answer(GOOD, "x"))
    monkeypatch.setattr(host, "PARAMETERS", tmp_path / "none")
    assert machine.test(Question("test_vmxon.py", {})).verdict == GOOD
    assert machine._do.ran == ["modprobe kvm_intel"]
    machine._do.fails["modprobe"] = "FATAL: Module kvm_intel not found"
    answer = machine.test(Question("test_vmxon.py", {}))
    assert (answer.verdict, answer.kind) == ("skip", "no start")
    assert len(asked) == 1


def test_the_real_case_where_there_is_no_vmx():
    """On a machine with VMX it runs the case."""
    answer = Question("test_vmxon.py::test_vmxon_enters_vmx_operation", {}).ask_here()
    if answer.verdict == "skip":
        assert answer.kind == "no start"
        assert answer.evidence


def test_parameters_that_the_modules_have_not(tmp_path, monkeypatch):
    for path, value in (("kvm_intel/parameters/ept", "Y"), ("kvm/parameters/tdp_mmu", "N")):
        change(path, value + "\n")(tmp_path)
    monkeypatch.setattr(host, "PARAMETERS", tmp_path / "kvm_intel/parameters")
    from kvmnest.bisect.probe import other_parameters

    assert other_parameters({"ept": "1", "kvm.tdp_mmu": "0", "kvm-intel.ept": "Y"}) == ""
    assert other_parameters({"ept": "0"}) == "kvm_intel has ept=Y, not 0"
    assert other_parameters({"kvm.x": "0"}) == "kvm has no parameter x"

"""What takes long says so, once, and not when it is cached."""

import marshal

import pytest

from kvmnest.lab import apts, bochs, cache, debian, kernels, saved
from kvmnest.lab.errors import LabSetupError
from kvmnest.lab.rootfs import Tree


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def _build(folder):
    (folder / "made").write_text("x")


@pytest.mark.parametrize("kind", ["kernel-sources", "kvm-trees"])
def test_a_long_wait_is_announced_once(kind, capsys):
    cache.entry(kind, "key", _build)
    told = capsys.readouterr().err
    assert told.startswith("kvmnest: ")
    assert told.count("\n") == 1
    assert " s" in told or "minute" in told
    cache.entry(kind, "key", _build)
    assert capsys.readouterr().err == ""


def test_a_short_one_is_not(capsys):
    cache.entry("modules", "key", _build)
    assert capsys.readouterr().err == ""


#: What loads a KVM that has no modules.
KVM = {"modules": [], "files": {}, "mtimes": {}}


@pytest.mark.parametrize("keep", [True, False])
def test_the_first_boot_says_so_and_later_ones_do_not(capsys, monkeypatch, keep):
    started = []

    class Process:
        pid = 42

        def start(self, memory, cpus, *, fixed):
            started.append(fixed)

        def place(self, write):
            pass

    monkeypatch.setattr(saved.snapshot, "resume", lambda *_: None)
    tree = Tree("key", {}, {})
    boots = saved.SavedBoots(bochs.locate(), 128, 1, (), lambda to: None, tree, keep_kvm=keep)
    _, resumed = boots.start(Process(), KVM, {"files": {}})
    assert not resumed
    assert capsys.readouterr().err == (
        "kvmnest: the first boot of this kernel here, which is saved for later ones: 5 to 30 s\n"
    )
    cache.entry("booted", boots._steps(KVM, {"files": {}})[0].key, _build)
    _, resumed = boots.start(Process(), KVM, {"files": {}})
    assert resumed
    assert capsys.readouterr().err == ""
    assert started == [True, True]


def test_a_kernel_that_is_fetched_says_so(capsys, monkeypatch):
    offer = debian.Offer("6.1-amd64", "6.1-1", ("bookworm",), 5, ("linux-image=6.1",), "key")
    apt = debian.Apt()
    apt.__dict__["offers"] = {offer.release: offer}
    monkeypatch.setattr(apts, "every", lambda: [apt])

    def fetch(*_):
        raise LabSetupError("no connection")

    monkeypatch.setattr(debian, "fetch", fetch)
    with pytest.raises(LabSetupError, match="no connection"):
        kernels.resolve("6.1")
    assert capsys.readouterr().err == (
        "kvmnest: fetching kernel 6.1-amd64 from Debian's archive, once: 5 to 30 s\n"
    )


@pytest.mark.parametrize("keep", [True, False])
def test_a_machine_is_saved_with_its_kvm_unless_that_changes(keep):
    """Runs with another KVM continue from where kvmnest is loaded."""
    tree = Tree("key", {"/a": b""}, {})
    boots = saved.SavedBoots(bochs.locate(), 128, 1, (), lambda to: None, tree, keep_kvm=keep)
    job = {"argv": ["true"], "files": {}}
    other = {**KVM, "modules": [("/kvm.ko", "ept=0")]}
    steps, steps_of_other = boots._steps(KVM, job), boots._steps(other, job)
    what = ("preload", "modules", "argv")
    mails = [[key for key in what if key in marshal.loads(step.mail)] for step in steps]
    assert mails == ([["preload"], ["modules"], ["argv"]] if keep else [["preload"], [*what[1:]]])
    assert [step.kind for step in steps] == ["booted", "loaded", "with-kvm"][: len(steps)]
    same = [a.key == b.key for a, b in zip(steps, steps_of_other, strict=True)]
    assert same == [True, True, False][: len(steps)]

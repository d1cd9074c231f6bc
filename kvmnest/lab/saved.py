"""Start Bochs where an earlier boot of the same machine was saved, or save it on the way."""

import marshal
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmnest.lab import bochs, cache, snapshot
from kvmnest.lab.bochs import Bochs
from kvmnest.lab.emulators import Picture
from kvmnest.lab.errors import LabSetupError
from kvmnest.lab.guest import MAILBOX_PAGES
from kvmnest.lab.rootfs import Tree
from kvmnest.lab.session import Sink
from kvmnest.lab.snapshot import SnapshotError

_KEPT = 12  # of each kind, some 150 MB each: for a ladder of kernels, or clones that differ
_FORMAT = 6
# And what runs cases, which stands above the lab.
_PRELOAD = ("kvmnest.lab.preloaded", "kvmnest.light.rewrite", "kvmnest.light.standin")


@dataclass(frozen=True)
class _Step:
    """A point at which the guest waits: where it is saved, and what it gets then."""

    kind: str
    key: str
    mail: bytes


class _Saver:
    """Called when the guest waits: saves it, if nobody has, and gives it the next mail."""

    def __init__(self, process: Bochs, steps: Sequence[_Step]) -> None:
        self._process = process
        self._steps = list(steps)

    def __call__(self, mark: bytes) -> None:
        pid, step = self._process.pid, self._steps.pop(0)
        mailbox: list[int] = []

        def build(folder: Path) -> None:
            mailbox.extend(snapshot.take(pid, folder, mark, MAILBOX_PAGES))

        try:
            cache.entry(step.kind, step.key, build, keep=_KEPT)
        except LabSetupError as e:  # this run can do without, and the next boots from cold
            print(f"kvmnest: this boot is not kept: {e}", file=sys.stderr, flush=True)
        if not mailbox:  # or another run of the same lab was faster
            mailbox.extend(snapshot.find_mailbox(pid, mark, MAILBOX_PAGES))
        snapshot.fill_mailbox(pid, mailbox, step.mail)


class SavedBoots:
    """Boots of one machine: ``memory`` MiB, ``cpus`` CPUs, and what ``made_of`` stands for.

    ``write_image`` writes the picture of memory that a boot from cold needs, ``tree`` is what is
    loaded after the boot. ``keep_kvm`` tells whether other runs will load the same KVM.
    """

    def __init__(
        self,
        emulator: bochs.Emulator,
        memory: int,
        cpus: int,
        made_of: Sequence[str | bytes],
        write_image: Picture,
        tree: Tree,
        keep_kvm: bool = True,
    ) -> None:
        self._memory, self._cpus = memory, cpus
        self._keep_kvm = keep_kvm
        self._write_image = write_image
        self._tree = tree
        machine = os.uname()
        self._key = cache.digest([
            _FORMAT, emulator.stamp(), bochs.configuration(emulator, memory, cpus), bochs.MSRS,
            *made_of, machine.release, machine.version, _host_cpu(),
        ])  # fmt: skip

    def start(self, process: Bochs, kvm: dict[str, Any], job: dict[str, Any]) -> tuple[Sink, bool]:
        """Start it in the best way there is; ``kvm`` is the part of the job that loads KVM.

        Returns what to call when the guest waits, and whether an earlier boot is continued.
        Raises SnapshotError if a waiting guest cannot be given this job, LabLost, LabSetupError,
        OSError.
        """
        steps = self._steps(kvm, job)
        if any(len(step.mail) > snapshot.capacity(MAILBOX_PAGES) for step in steps):
            raise SnapshotError("the job is larger than the guest's mailbox")
        for number in reversed(range(len(steps))):
            step = steps[number]
            saved = cache.existing(step.kind, step.key)
            if saved is None:
                continue
            try:
                self._resume(process, saved, step.mail)
            except SnapshotError:
                process.stop()
                cache.drop(saved)
                continue
            return _Saver(process, steps[number + 1 :]), True
        cache.tell("the first boot of this kernel here, which is saved for later ones: 5 to 30 s")
        process.start(self._memory, self._cpus, fixed=True)
        process.place(self._write_image)
        return _Saver(process, steps), False

    def _resume(self, process: Bochs, saved: Path, mail: bytes) -> None:
        """Start an emulator that only has the right shape, and put the saved one into it."""
        process.start(self._memory, self._cpus, fixed=True)
        snapshot.resume(process.pid, saved, mail)

    def _steps(self, kvm: dict[str, Any], job: dict[str, Any]) -> list[_Step]:
        """The points at which the guest waits: after the boot, with kvmnest loaded, with KVM.

        The second changes with each edit of kvmnest, but is made from the first in no time. A KVM
        that is not kept is loaded with the job.
        """
        load = {
            "files": self._tree.files,
            "mtimes": self._tree.mtimes,
            "preload": _PRELOAD,
        }
        loaded = cache.digest([self._key, self._tree.key, *_PRELOAD])
        steps = [_Step("booted", self._key, marshal.dumps(load))]
        if not self._keep_kvm:
            whole = {**kvm, **job, "files": kvm["files"] | job["files"]}
            return [*steps, _Step("loaded", loaded, marshal.dumps(whole))]
        mail = marshal.dumps(kvm)
        steps += [_Step("loaded", loaded, mail)]
        return [*steps, _Step("with-kvm", cache.digest([loaded, mail]), marshal.dumps(job))]


def _host_cpu() -> str:
    """Model and features of this machine's CPU, which a saved process has adapted to."""
    with open("/proc/cpuinfo") as f:
        return "".join(line for line in f.read().partition("\n\n")[0].splitlines(True)
                       if line.startswith(("model name", "flags", "microcode")))  # fmt: skip

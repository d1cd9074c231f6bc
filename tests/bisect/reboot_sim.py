"""A machine that is only acted: it boots, crashes and loses power as told, and forgets its RAM."""

import json

from kvmnest.bisect import disk
from kvmnest.bisect.probe import GOOD, Answer
from kvmnest.bisect.reboot import session, state
from kvmnest.bisect.reboot.host import RebootNeeded
from kvmnest.errors import HarnessError

HOME = "6.1.0-99-amd64"
#: What a kernel can do besides being good or bad.
DEAD, CRASH = "dead", "crash"


class PowerLost(BaseException):
    """The machine is off: nothing of the process lives on."""


class Sim:
    """``outcomes`` tells what each kernel does; a list of them is what it does in turn.

    A number in ``cuts`` is an event (a write to the disk, a change of the machine) at which the
    power fails, once before it and once after it.
    """

    def __init__(self, folder, outcomes, cuts=()):
        self.folder = folder
        self.outcomes = outcomes
        self.cuts = set(cuts)
        self.events = 0
        self.menu = {HOME}
        self.saved = "0"
        self.parameters = None
        self.next = None
        self.unit = None
        self.boots = 1
        self.kernel = HOME
        self.booted_with = None
        self.tested = []
        self.blamed = set()
        self.full = False
        self.clears_choice = True

    # --- time passes ---

    def event(self):
        """The power fails here if it is to."""
        self.events += 1
        if self.events in self.cuts and not self._lost_before():
            raise PowerLost

    def _lost_before(self):
        # Twice in the case of one kernel, or twice before it is noted that it came up, cannot be
        # told from a kernel that crashes, or does not boot.
        path = self.folder / "state.json"
        trial = json.loads(path.read_text())["trial"] if path.exists() else None
        came_up = trial and trial["phase"] == state.ARMED and trial["release"] == self.kernel
        if not came_up and not (trial and trial["phase"] == state.TEST):
            return False
        known = (trial["name"], trial["phase"]) in self.blamed
        self.blamed.add((trial["name"], trial["phase"]))
        return known

    def start(self):
        """From off to a running system: what is chosen, else the default."""
        wanted, self.next = self.next, self.next if not self.clears_choice else None
        # Without a saved default GRUB boots its first entry, the newest kernel.
        default = self.saved if self.saved in self.menu else max(self.menu)
        self.boots += 1
        self.kernel = wanted or default
        if self.outcomes.get(self.kernel) == DEAD:
            self.boots += 1  # it panics, and panic=10 restarts the machine
            assert wanted, "the default kernel does not boot"
            self.kernel = default
        self.booted_with = self.parameters

    # --- Host ---

    def check(self, *, own_kernels):
        pass

    def boot_id(self):
        return f"boot-{self.boots}"

    def running(self):
        return self.kernel

    def has(self, release):
        return release in self.menu

    def install_package(self, release):
        self.event()
        if self.full:
            raise HarnessError("apt-get failed: E: You don't have enough free space")
        if self.outcomes.get(release) == "gone":
            return f"this system's apt has no linux-image-{release} any more"
        self.menu.add(release)
        self.event()
        return ""

    def update_menu(self):
        pass

    def remove(self, release):
        self.event()
        assert release not in (self.kernel, HOME)
        self.menu.discard(release)
        self.event()

    def default(self):
        return self.saved

    def prepare(self, home, parameters):
        self.event()
        self.parameters = list(parameters)
        self.event()
        self.saved = home
        self.event()

    def restore(self, default):
        self.event()
        self.parameters = None
        self.event()
        self.saved = default
        self.event()

    def choose(self, release):
        assert release in self.menu
        self.event()
        self.next = release
        self.event()

    def still_chosen(self):
        return self.next is not None

    def forget_choice(self):
        self.next = None

    def install_unit(self, arguments):
        self.event()
        self.unit = list(arguments)
        self.event()

    def remove_unit(self):
        self.event()
        self.unit = None
        self.event()

    def reboot(self):
        self.event()
        self.start()
        self.event()

    def test(self, question):
        assert "kvm_intel.nested=1" in (self.booted_with or ()), "booted without our parameters"
        self.event()
        outcome = self.outcomes.get(self.kernel, GOOD)
        if isinstance(outcome, list):
            outcome = outcome.pop(0)
        self.tested.append(self.kernel)
        if outcome == CRASH:
            raise PowerLost
        self.event()
        return Answer(outcome, f"{outcome} on {self.kernel}", self.kernel)


def watched(sim, monkeypatch):
    """Let the sim see each write to the disk."""
    for name in ("replace", "append", "remove"):
        real = getattr(disk, name)

        def write(*arguments, real=real):
            sim.event()
            real(*arguments)
            sim.event()

        monkeypatch.setattr(disk, name, write)


def live(sim, begin, say=lambda line: None, most=200):
    """Go through as many boots as it takes; returns the exit code of the bisection.

    ``begin`` is what the user does at first, and again if nothing of it reached the disk. Later
    only the unit acts.
    """
    for _ in range(most):
        try:
            found = state.load(sim.folder)
            if found is None:
                found = begin()
            elif found.phase not in (state.PREPARE, state.DONE):
                assert sim.unit == session.unit_arguments(sim.folder), "nobody goes on"
            return session.go_on(found, sim, say)
        except RebootNeeded:
            try:
                sim.reboot()
            except PowerLost:
                sim.start()
        except PowerLost:
            sim.start()
    raise AssertionError("it never ends")

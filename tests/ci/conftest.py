"""ci/nested as a module, and a kernel made of files for it."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

# rmmod and modprobe for a /sys/module made of files, as the real ones change it: parameters that
# are not given get the defaults in the file "defaults".
_KMOD = """#!{python}
import shutil, sys
from pathlib import Path
root = Path({root!r})
module = root / "kvm_intel"
with open(root / "log", "a") as log:
    print(Path(sys.argv[0]).name, *sys.argv[1:], file=log)
assert sys.argv[1] == "kvm_intel"
if Path(sys.argv[0]).name == "rmmod":
    if int((module / "refcnt").read_text()):
        sys.exit("rmmod: ERROR: Module kvm_intel is in use")
    shutil.rmtree(module)
else:
    given = dict(word.split("=") for word in sys.argv[2:])
    if any(value in (root / "rejected").read_text().split() for value in sys.argv[2:]):
        sys.exit("modprobe: ERROR: could not insert 'kvm_intel': Invalid argument")
    values = dict(line.split("=") for line in (root / "defaults").read_text().split()) | given
    (module / "parameters").mkdir(parents=True)
    (module / "initstate").write_text("live\\n")
    (module / "refcnt").write_text("0\\n")
    if values["ept"] == "N":
        values["vmentry_l1d_flush"] = "EPT disabled"  # as the real one says it
    if "disabled" in " ".join(sys.argv[2:]):
        sys.exit("modprobe: ERROR: could not insert 'kvm_intel': Invalid argument")
    for name, value in values.items():
        shown = dict([("0", "N"), ("1", "Y")]).get(value, value)
        (module / "parameters" / name).write_text(shown + "\\n")
"""


@pytest.fixture(scope="session")
def nested() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("ci_nested", str(ROOT / "ci" / "nested"))
    spec = importlib.util.spec_from_loader("ci_nested", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ci_nested"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


class Kernel:
    """A /sys/module and /proc made of files, with a kvm_intel that is loaded with nested=N."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.module = root / "kvm_intel"
        self.proc = root / "proc"
        self.state = root / "state.json"
        self.proc.mkdir()
        (root / "rejected").write_text("")
        (root / "defaults").write_text("nested=N ept=Y ple_gap=128 vmentry_l1d_flush=auto")
        (self.proc / "cpuinfo").write_text("processor : 0\nflags : fpu vmx sse\n\n")
        tools = root / "bin"
        tools.mkdir()
        for name in ("rmmod", "modprobe"):
            (tools / name).write_text(_KMOD.format(python=sys.executable, root=str(root)))
            (tools / name).chmod(0o755)
        self.load(nested="N", ept="Y", ple_gap="128")

    def load(self, **parameters: str) -> None:
        (self.module / "parameters").mkdir(parents=True)
        (self.module / "initstate").write_text("live\n")
        (self.module / "refcnt").write_text("0\n")
        for name, value in parameters.items():
            (self.module / "parameters" / name).write_text(value + "\n")

    def parameters(self) -> dict[str, str]:
        return {
            path.name: path.read_text().strip() for path in (self.module / "parameters").iterdir()
        }

    def log(self) -> list[str]:
        path = self.root / "log"
        return path.read_text().splitlines() if path.exists() else []

    def hold(self, pid: int, name: str, target: str) -> None:
        folder = self.proc / str(pid) / "fd"
        folder.mkdir(parents=True)
        (folder / "7").symlink_to(target)
        (folder.parent / "comm").write_text(name + "\n")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return made

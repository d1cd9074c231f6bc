"""Compile Python on the host for the guest, which would take a hundred times as long."""

import importlib.util
import marshal
import os
import subprocess
import sys
from pathlib import Path

from kvmnest.lab.errors import LabSetupError

_COMPILER = """
import marshal, sys
jobs = marshal.load(sys.stdin.buffer)
done = []
for path, name, level in jobs:
    with open(path, "rb") as f:
        source = f.read()
    try:
        code = compile(source, name, "exec", optimize=level, dont_inherit=True)
        done.append(marshal.dumps(code))
    except (SyntaxError, ValueError):
        done.append(b"")
marshal.dump(done, sys.stdout.buffer)
"""


def compile_sources(jobs: list[tuple[str, str, int]]) -> list[bytes]:
    """Compile (path, name in tracebacks, optimisation level) to .pyc images, in order.

    They have no column positions (a third less to load) and are "unchecked": the guest never
    compares them with a source. A file that is not valid Python gives b"".
    """
    shares = min(os.cpu_count() or 1, 4)
    command = [sys.executable, "-I", "-S", "-X", "no_debug_ranges", "-c", _COMPILER]
    workers = []
    for share in range(shares):
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert worker.stdin is not None
        marshal.dump(jobs[share::shares], worker.stdin)
        worker.stdin.close()
        workers.append(worker)
    results = [b""] * len(jobs)
    for share, worker in enumerate(workers):
        assert worker.stdout is not None
        output = worker.stdout.read()
        if worker.wait():
            raise LabSetupError(
                f"compiling Python for the guest failed (status {worker.returncode})"
            )
        results[share::shares] = marshal.loads(output)
    header = importlib.util.MAGIC_NUMBER + b"\1\0\0\0" + bytes(8)
    return [header + code if code else b"" for code in results]


_REWRITER = """
import ast, importlib.util, marshal, os, sys, tempfile
from pathlib import Path
from _pytest.assertion.rewrite import PYC_TAIL, _read_pyc, rewrite_asserts

def formats(source, mtime):
    # pytest checks the source by its hash (from 9 on) or by time and size.
    yield (3).to_bytes(4, "little") + importlib.util.source_hash(source)
    size = (len(source) & 0xFFFFFFFF).to_bytes(4, "little")
    yield bytes(4) + mtime.to_bytes(4, "little") + size

def accepted(path, pyc):
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "x.pyc")
        target.write_bytes(pyc)
        return _read_pyc(Path(path), target) is not None

done = []
for path, name, mtime in marshal.load(sys.stdin.buffer):
    source = Path(path).read_bytes()
    tree = ast.parse(source, filename=name)
    rewrite_asserts(tree, source, name)
    code = marshal.dumps(compile(tree, name, "exec", dont_inherit=True))
    pycs = (importlib.util.MAGIC_NUMBER + stamp + code for stamp in formats(source, mtime))
    done.append(next(pyc for pyc in pycs if accepted(path, pyc)))
marshal.dump((PYC_TAIL, done), sys.stdout.buffer)
"""


def rewritten(files: list[tuple[Path, str]]) -> dict[str, bytes]:
    """Compile (path, guest path) as pytest rewrites it: cache file name -> content.

    Rewriting the suite's assertions in the guest takes ten times as long as running it. A pytest
    that does not offer the function this needs gives {}, and the guest rewrites.
    """
    jobs = [(str(path), name, int(path.stat().st_mtime) & 0xFFFFFFFF) for path, name in files]
    done = subprocess.run(
        [sys.executable, "-X", "no_debug_ranges", "-c", _REWRITER],
        input=marshal.dumps(jobs),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        return {}
    tail, results = marshal.loads(done.stdout)
    return {
        f"{name.rpartition('/')[0]}/__pycache__/{path.stem}{tail}": pyc
        for (path, name), pyc in zip(files, results, strict=True)
    }

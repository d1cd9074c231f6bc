"""PEP 517 backend: setuptools, plus the generated files that go into the package.

Before setuptools looks at the tree, the cffi declarations are compiled to
``kvmnest/kvm/_abi.py``, the payload to ``kvmnest/data/l1.elf`` and Bochs' ROMs to
``kvmnest/data/*_boot.bin``, so an installed wheel needs neither a compiler nor binutils. A
source distribution carries them too: as long as its sources are untouched it installs without
binutils.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.command import egg_info

ROOT = Path(__file__).resolve().parent.parent
_PACKAGE = ROOT / "kvmnest"

# The list of the source distribution's files, which setuptools would look for in the top folder.
egg_info.manifest_maker.template = "payloads/MANIFEST.in"

get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
get_requires_for_build_wheel = build_meta.get_requires_for_build_wheel
get_requires_for_build_editable = build_meta.get_requires_for_build_editable
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable


def _load(path: str) -> Any:
    # By file: the packages around these modules import what is installed later, if at all.
    spec = importlib.util.spec_from_file_location(f"_build_{Path(path).parent}", _PACKAGE / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _generate() -> None:
    sys.path.insert(0, str(ROOT))
    try:
        _load("kvm/cdef.py").generate()
        payload = _load("l1/build.py")
        # Its build ID is the hash of its sources.
        wanted = bytes.fromhex(payload.source_hash())
        if not payload.ELF.is_file() or wanted not in payload.ELF.read_bytes():
            payload.build()
        roms = _load("lab/build.py")
        for name in roms.ROMS:
            roms.build(name)
    finally:
        sys.path.remove(str(ROOT))


def build_wheel(*args: Any, **kwargs: Any) -> str:
    """Generate, then build the wheel."""
    _generate()
    return str(build_meta.build_wheel(*args, **kwargs))


def build_editable(*args: Any, **kwargs: Any) -> str:
    """Generate, then build the editable wheel."""
    _generate()
    return str(build_meta.build_editable(*args, **kwargs))


def build_sdist(*args: Any, **kwargs: Any) -> str:
    """Generate, then build the source distribution."""
    _generate()
    return str(build_meta.build_sdist(*args, **kwargs))

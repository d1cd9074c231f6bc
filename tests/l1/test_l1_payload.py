"""The payload file: building it, reading it, and every way in which it can be wrong."""

import shutil
from pathlib import Path

import pytest

from kvmnest.errors import PayloadError
from kvmnest.l1 import build, payload
from kvmnest.l1.payload import ABI_VERSION


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    copy = tmp_path / "payloads"
    shutil.copytree(build.SOURCES, copy)
    return copy


def test_symbols_and_segments() -> None:
    loaded = payload.default()
    assert loaded["ABI_VERSION"] == payload.ABI_VERSION
    assert loaded.entry == loaded["l1_start"]
    low, high = loaded["cpu0_slots"], loaded["cpu1_slots"]
    assert high - low == loaded["SLOT_COUNT"] * loaded["SLOT_SIZE"]
    for address, content in loaded.segments:
        assert address + len(content) <= loaded["work_end"]


def test_stubs_are_where_16_bit_offsets_reach() -> None:
    loaded = payload.default()
    assert loaded["l2_ivt"] < 0x10000
    assert loaded["l2_16_handlers"] < 0x10000


def test_unknown_symbol() -> None:
    with pytest.raises(PayloadError, match="no symbol 'nonsense'"):
        payload.default()["nonsense"]


def test_build_is_reproducible(sources: Path, tmp_path: Path) -> None:
    first = build.build(tmp_path / "a.elf", sources).read_bytes()
    second = build.build(tmp_path / "b.elf", sources).read_bytes()
    assert first == second


def test_build_id_follows_the_sources(sources: Path, tmp_path: Path) -> None:
    first = payload.load(build.build(tmp_path / "a.elf", sources))
    assert first.build_id == build.source_hash(sources)
    (sources / "l2.s").write_text((sources / "l2.s").read_text() + "# changed\n")
    second = payload.load(build.build(tmp_path / "b.elf", sources))
    assert first.build_id != second.build_id


def test_changed_payload_is_built_again(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elf = tmp_path / "l1.elf"
    monkeypatch.setattr(build, "ELF", elf)
    monkeypatch.setattr(build.source_hash, "__defaults__", (sources,))
    monkeypatch.setattr(build.build, "__defaults__", (elf, sources))
    monkeypatch.setattr(payload.load, "__defaults__", (elf,))
    payload.default.cache_clear()
    first = payload.default().build_id
    (sources / "l2.s").write_text((sources / "l2.s").read_text() + "# changed\n")
    payload.default.cache_clear()
    assert payload.default().build_id != first
    payload.default.cache_clear()


@pytest.mark.parametrize("content", [b"", b"no ELF file at all", "ABI"])
def test_unusable_payload_is_built_again(
    content: bytes | str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a pull that raised the ABI's version: the old file must not be in the way."""
    elf = tmp_path / "l1.elf"
    if isinstance(content, bytes):
        elf.write_bytes(content)
    else:
        other = tmp_path / "other"
        shutil.copytree(sources, other)
        text = (other / "abi.inc").read_text()
        (other / "abi.inc").write_text(
            text.replace(f"ABI_VERSION,            {ABI_VERSION}", "ABI_VERSION,            99")
        )
        build.build(elf, other)
        with pytest.raises(PayloadError, match="payload ABI 99"):
            payload.load(elf)
    monkeypatch.setattr(build, "ELF", elf)
    monkeypatch.setattr(build.source_hash, "__defaults__", (sources,))
    monkeypatch.setattr(build.build, "__defaults__", (elf, sources))
    monkeypatch.setattr(payload.load, "__defaults__", (elf,))
    payload.default.cache_clear()
    try:
        assert payload.default().build_id == build.source_hash(sources)
    finally:
        payload.default.cache_clear()


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(PayloadError, match=r"no payload at .*; run 'python -m kvmnest.l1.build'"):
        payload.load(tmp_path / "none.elf")


@pytest.mark.parametrize("keep", [0, 3, 40, 100, 5000, 100000, 120000])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "short.elf"
    path.write_bytes(build.ELF.read_bytes()[:keep])
    with pytest.raises(PayloadError, match=r"short\.elf"):
        payload.load(path)


def test_not_elf(tmp_path: Path) -> None:
    path = tmp_path / "text.elf"
    path.write_text("no ELF file at all\n" * 100)
    with pytest.raises(PayloadError, match="not usable"):
        payload.load(path)


def test_other_abi(sources: Path, tmp_path: Path) -> None:
    text = (sources / "abi.inc").read_text()
    changed = text.replace(f"ABI_VERSION,            {ABI_VERSION}", "ABI_VERSION,            99")
    assert changed != text
    (sources / "abi.inc").write_text(changed)
    elf = build.build(tmp_path / "abi.elf", sources)
    with pytest.raises(PayloadError, match=f"payload ABI 99, kvmnest needs {ABI_VERSION}"):
        payload.load(elf)


def test_error_in_the_sources(sources: Path, tmp_path: Path) -> None:
    (sources / "l2.s").write_text("        nosuchinstruction\n")
    with pytest.raises(PayloadError, match="cannot build the payload: as:"):
        build.build(tmp_path / "x.elf", sources)
    assert not (tmp_path / "x.elf").exists()


def test_no_assembler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PayloadError, match="apt-get install binutils"):
        build.build(tmp_path / "x.elf")


def test_no_sources(tmp_path: Path) -> None:
    with pytest.raises(PayloadError, match="no sources"):
        build.build(tmp_path / "x.elf", tmp_path)


@pytest.mark.parametrize("present", ["nothing", "junk", "of other sources", "fresh"])
def test_a_stale_payload_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: str
) -> None:
    elf = tmp_path / "l1.elf"
    monkeypatch.setattr(build, "ELF", elf)
    monkeypatch.setattr(build.build, "__defaults__", (elf, build.SOURCES))
    if present == "junk":
        elf.write_bytes(b"junk")
    elif present != "nothing":
        build.build()
        if present == "of other sources":
            digest = bytes.fromhex(build.source_hash() or "")
            elf.write_bytes(elf.read_bytes().replace(digest, bytes(len(digest))))
    before = elf.stat().st_mtime_ns if elf.exists() else 0
    build.build_if_stale()
    assert payload.load(elf).build_id == build.source_hash()
    assert (elf.stat().st_mtime_ns == before) == (present == "fresh")

"""The documentation builds without a warning, and a warning is an error."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvmnest.cli.main import verbs

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "kvmnest" / "docs"
sys.path.insert(0, str(DOCS / "extension"))


def sphinx(source, out):
    return subprocess.run(
        [
            *(sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"),
            *("-d", str(out.with_suffix(".doctrees")), "-c", str(DOCS), str(source), str(out)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs") / "html"
    done = sphinx(DOCS, out)
    assert done.returncode == 0, done.stderr
    return out


def test_the_command_reference_has_every_verb_and_option(built):
    page = (built / "commands.html").read_text()
    assert [verb for verb in verbs() if f'id="kvmnest-{verb}"' not in page] == []
    assert "--nested-roundtrip" in page


def test_the_api_reference_has_every_module_and_its_classes(built):
    from documented_modules import public_modules

    for package in ("kvm", "vmx", "l1", "cases", "plugin", "lab", "reports", "run"):
        page = (built / "api" / f"{package}.html").read_text()
        names = list(public_modules(f"kvmnest.{package}"))
        assert len(names) > 5
        assert [name for name in names if f'id="module-{name}"' not in page] == []
    assert 'id="kvmnest.kvm.vcpu.Vcpu.run"' in (built / "api" / "kvm.html").read_text()
    assert "module-kvmnest.kvm._abi" not in (built / "api" / "kvm.html").read_text()


def test_types_in_signatures_lead_to_their_own_class(built):
    # The module imports the class for the type checker only.
    page = (built / "api" / "cases.html").read_text()
    start = page.index('id="kvmnest.cases.needs.why_skipped"')
    assert 'href="#kvmnest.cases.offer.HostOffer"' in page[start : start + 2000]


def test_the_results_page_has_every_member_of_the_schema(built):
    import json

    schema = json.loads((ROOT / "kvmnest/data/results.schema.json").read_text())
    page = (built / "results.html").read_text()
    for part in (schema, schema["$defs"]["case"]):
        for name in part["properties"]:
            assert f'<span class="pre">{name}</span>' in page, name


def test_the_exit_codes_come_from_the_verbs(built):
    from documented_formats import exit_codes

    from kvmnest.cli.main import parser

    page = (built / "exit-codes.html").read_text()
    assert "kvmnest bisect" in page.replace('</span> <span class="pre">', " ")
    bisect = parser(["bisect"])._subparsers._group_actions[0].choices["bisect"]
    codes = dict(exit_codes(bisect))
    assert codes["125"] == "step: cannot be tested"
    assert codes["2"] == "usage or good and bad are not"
    assert "cannot be tested" in page


def test_every_page_can_be_reached(built):
    # -W covers a page in no toctree; this one that the menu of the first page has them all.
    index = (built / "index.html").read_text()
    for page in DOCS.glob("*.md"):
        if page.stem != "index":
            # In the menu at the side and in the table on the page, in each once.
            item = f'<li class="toctree-l1"><a class="reference internal" href="{page.stem}.html">'
            assert index.count(item) == 2, page.name


@pytest.mark.parametrize("fault", ["[gone](no-such-page.md)", "{py:class}`kvmnest.kvm.NoSuch`"])
def test_a_broken_reference_fails_the_build(tmp_path, fault):
    source = tmp_path / "source"
    source.mkdir()
    (source / "index.md").write_text(f"# Title\n\n{fault}\n")
    assert sphinx(source, tmp_path / "html").returncode == 1


def test_pages_are_no_part_of_the_labs_image():
    from kvmnest.lab.rootfs import kvmnest_files

    files = kvmnest_files().files
    assert any(name.endswith("kvmnest/cli/main.py") for name in files)
    assert [name for name in files if "/docs/" in name] == []


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_the_script_is_clean():
    done = subprocess.run(
        ["shellcheck", "-x", "ci/docs"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout

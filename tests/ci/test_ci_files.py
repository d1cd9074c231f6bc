"""The ready CI files: schemas, security, shell, units; and the job itself."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / "ci"
BIN = Path(sys.executable).parent

ZIZMOR = [str(BIN / "zizmor"), "--quiet", "--offline", "--no-progress"]


def run(*argv, **options):
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120, **options)


def schema_check(schema, path):
    return run(str(BIN / "check-jsonschema"), "--builtin-schema", f"vendor.{schema}", str(path))


@pytest.mark.parametrize(
    ("schema", "name", "right", "wrong"),
    [
        ("github-workflows", "github-actions.yml", "runs-on: ubuntu", "run-on: ubuntu"),
        ("gitlab-ci", "gitlab-ci.yml", "  tags:", "  tag:"),
    ],
)
def test_ci_files_follow_their_schema(tmp_path, schema, name, right, wrong):
    done = schema_check(schema, CI / name)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (CI / name).read_text()
    assert right in text
    broken = tmp_path / name
    broken.write_text(text.replace(right, wrong))
    assert schema_check(schema, broken).returncode == 1


def test_the_workflow_is_safe_on_a_machine_of_ones_own(tmp_path):
    done = run(*ZIZMOR, str(CI / "github-actions.yml"))
    assert done.returncode == 0, done.stdout + done.stderr
    text = (CI / "github-actions.yml").read_text()
    broken = tmp_path / "broken.yml"
    broken.write_text(text.replace('--kernel "$KERNEL"', "--kernel ${{ github.head_ref }}"))
    assert run(*ZIZMOR, str(broken)).returncode != 0


def shell_steps():
    """Every shell text in the CI files, as (file, text)."""
    yaml = pytest.importorskip("ruamel.yaml").YAML(typ="safe")
    workflow = yaml.load(CI / "github-actions.yml")
    for job in workflow["jobs"].values():
        yield from (("github", step["run"]) for step in job["steps"] if "run" in step)
    for job in yaml.load(CI / "gitlab-ci.yml").values():
        if isinstance(job, dict):
            for part in ("before_script", "script", "after_script"):
                yield from (("gitlab", text) for text in job.get(part, ()))


def test_shell_texts_in_ci_files_are_clean_and_name_what_exists():
    texts = list(shell_steps())
    assert len(texts) >= 9
    for _, text in texts:
        done = run("shellcheck", "--shell=bash", "-", input=text)
        assert done.returncode == 0, text + done.stdout
        for name in re.findall(r"\bci/\w+", text):
            assert (ROOT / name).is_file(), name


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_units_are_valid(tmp_path):
    for kind in ("service", "timer"):
        text = (CI / "systemd" / f"kvmnest.{kind}").read_text()
        (tmp_path / f"kvmnest.{kind}").write_text(text.replace("/opt/kvmnest", str(ROOT)))
    units = [str(tmp_path / "kvmnest.timer"), str(tmp_path / "kvmnest.service")]
    done = run("systemd-analyze", "verify", *units)
    assert (done.returncode, done.stderr) == (0, "")
    text = Path(units[1]).read_text()
    assert "ci/job" in text
    Path(units[1]).write_text(text.replace("ci/job", "ci/no-such-job"))
    assert run("systemd-analyze", "verify", *units).returncode != 0


@pytest.mark.skipif(not shutil.which("bochs"), reason="bochs is not installed")
def test_the_job_keeps_the_reports_and_the_exit_code(tmp_path):
    case = "test_vmxon.py::test_vmxon_enters_vmx_operation"
    done = run(str(CI / "job"), "reports", "--target", "lab", "-j1", case, cwd=tmp_path)
    reports = tmp_path / "reports"
    results = json.loads((reports / "results.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert results["complete"]
    assert results["summary"]["passed"] >= 1
    assert (reports / "run.log").read_text() in done.stdout
    assert (reports / "doctor.txt").read_text() in done.stdout
    assert isinstance(json.loads((reports / "doctor.json").read_text()), dict)
    assert "testsuite" in (reports / "junit.xml").read_text()


def test_a_job_that_cannot_run_says_why_in_its_reports(tmp_path):
    done = run(str(CI / "job"), "reports", "no/such/file.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "no/such/file.py" in (tmp_path / "reports" / "run.log").read_text()


@pytest.mark.parametrize("argv", [[], ["--target"]])
def test_the_job_wants_a_folder(argv, tmp_path):
    done = run(str(CI / "job"), *argv, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: job FOLDER")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(str(CI / "job"), "file/reports", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr == "job: cannot write reports to file/reports\n"

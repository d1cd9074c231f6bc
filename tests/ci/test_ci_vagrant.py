"""The Vagrantfile: vagrant and vagrant-libvirt accept it, and its own Ruby works."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    shutil.which("vagrant") is None,
    reason="vagrant is not installed: apt-get install vagrant vagrant-libvirt",
)

# Enough of Vagrant to run the triggers of the Vagrantfile on a machine that is a folder.
_RUBY = r"""
require "fileutils"
require "ostruct"
module Vagrant
  module Errors; class VagrantError < StandardError; end; end
  class Recorder < BasicObject
    def initialize; @triggers = []; @provisions = {}; end
    attr_reader :triggers, :provisions
    def vm; self; end
    def trigger; self; end
    def before(kinds); note(:before, kinds) { |t| yield t }; end
    def after(kinds); note(:after, kinds) { |t| yield t }; end
    def note(time, kinds)
      made = ::OpenStruct.new(time: time, kinds: kinds)
      made.define_singleton_method(:ruby) { |&block| made[:block] = block }
      yield made
      @triggers << made
    end
    def provider(_name); yield ::OpenStruct.new; end
    def provision(name, **options); @provisions[name] = options; end
    def synced_folder(*_, **_options); end
    def method_missing(*); end
  end
  def self.configure(_version)
    $config = Recorder.new
    yield $config
  end
end
load "Vagrantfile"
class Machine
  def communicate; self; end
  def execute(command); yield :stdout, IO.popen(["sh", "-c", command], chdir: $guest, &:read); end
  def download(from, to); FileUtils.cp(File.join($guest, from), to); end
end
$guest, verb = ARGV
begin
  case verb
  when "before", "after"
    $config.triggers.find { |t| t.time == verb.to_sym && t.kinds.include?(:up) }
           .block.call(nil, Machine.new)
  when "suite" then puts $config.provisions["suite"][:inline]
  end
rescue Vagrant::Errors::VagrantError => e
  warn e.error_message
  exit 1
end
"""


@pytest.fixture
def project(tmp_path):
    """A copy of what the Vagrantfile uses: vagrant writes into its folder."""
    folder = tmp_path / "project"
    (folder / "ci").mkdir(parents=True)
    shutil.copy(ROOT / "Vagrantfile", folder)
    shutil.copy(ROOT / "ci" / "nested", folder / "ci")
    (folder / "probe.rb").write_text(_RUBY)
    return folder


def vagrant(project, *argv):
    return subprocess.run(
        ["vagrant", *argv],
        cwd=project,
        env={"PATH": "/usr/bin:/bin", "HOME": str(project), "VAGRANT_CHECKPOINT_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def probe(project, *argv, env=None):
    return subprocess.run(
        ["ruby", "probe.rb", *argv],
        cwd=project,
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"} | (env or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_vagrant_and_its_libvirt_provider_accept_the_file(project):
    done = vagrant(project, "validate")
    assert done.returncode == 0, done.stderr
    text = (project / "Vagrantfile").read_text()
    (project / "Vagrantfile").write_text(text.replace("libvirt.nested =", "libvirt.nest ="))
    assert vagrant(project, "validate").returncode != 0


def test_a_host_without_nested_vmx_is_told_so_before_anything_is_fetched(project):
    check = subprocess.run([ROOT / "ci/nested", "check"], capture_output=True, check=False)
    if check.returncode == 0:
        pytest.skip("this host has nested VMX")
    done = vagrant(project, "up")
    assert done.returncode == 1
    assert done.stderr.startswith("This host cannot give VMX to a VM. nested: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "box" not in done.stdout.lower()


def test_a_host_with_nested_vmx_goes_on(project, tmp_path):
    (project / "ci" / "nested").write_text("print('on')\n")
    assert probe(project, str(tmp_path), "before").returncode == 0


@pytest.mark.parametrize("code", [0, 1])
def test_reports_come_back_and_the_verdict_counts(project, tmp_path, code):
    reports = tmp_path / "guest" / "reports"
    reports.mkdir(parents=True)
    (reports / "exit-code").write_text(f"{code}\n")
    (reports / "results.json").write_text("{}")
    done = probe(project, str(tmp_path / "guest"), "after")
    assert done.returncode == code, done.stderr
    assert ("exit code 1" in done.stderr) == (code == 1)
    assert (project / "build" / "vagrant" / "results.json").read_text() == "{}"


def test_arguments_reach_the_suite_in_one_piece(project, tmp_path):
    env = {"KVMNEST_ARGS": "-k 'vmxon and not twice'"}
    text = probe(project, str(tmp_path), "suite", env=env).stdout
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sg").write_text(
        '#!/bin/sh\nshift 2\neval "set -- $1"\nprintf "%s\\n" "$@" >seen\nexit 5\n'
    )
    (tools / "sg").chmod(0o755)
    path = f"{tools}:/usr/bin:/bin"
    done = subprocess.run(["sh", "-c", text], cwd=tmp_path, env={"PATH": path}, check=False)
    assert done.returncode == 0
    words = ["/vagrant/ci/job", "reports", "--target", "kvm", "-k", "vmxon and not twice"]
    assert (tmp_path / "seen").read_text().splitlines() == words
    assert (tmp_path / "reports" / "exit-code").read_text() == "5\n"

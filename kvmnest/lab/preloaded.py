"""What nearly every case uses, for the lab's guest to import before the machine is saved.

Only modules that pytest does not rewrite. The payload, which takes the emulated CPU half a second
to read, is read once here for all processes that are forked later.
"""

import pkgutil
from importlib import import_module

import kvmnest.cases.explain
import kvmnest.cases.needs
import kvmnest.cases.verdict
import kvmnest.kvm
import kvmnest.l1
import kvmnest.vmx.capinfo
import kvmnest.vmx.control_fields
import kvmnest.vmx.exitinfo
import kvmnest.vmx.outcome
from kvmnest.l1 import command

for _package in (kvmnest.kvm, kvmnest.l1):
    for _module in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        import_module(_module.name)
command.checked_payload()

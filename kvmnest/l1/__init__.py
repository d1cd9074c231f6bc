"""L1: the bare-metal hypervisor in a VM, driven one instruction at a time."""

from kvmnest.l1.baseline import L2Mode
from kvmnest.l1.command import Mode, Shadow
from kvmnest.l1.l1 import L1
from kvmnest.l1.lost import VmLost
from kvmnest.l1.vmcs import Vmcs

__all__ = ["L1", "L2Mode", "Mode", "Shadow", "VmLost", "Vmcs"]

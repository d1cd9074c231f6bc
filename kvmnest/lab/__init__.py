"""The software lab: a real Linux KVM with nested VMX, booted in Bochs, driven from Python.

``kvmnest.lab.machine.Lab`` is the entry. This module imports nothing, because the guest's first
process imports it too, at the speed of an emulator.
"""

DEFAULT_KERNEL = "6.1"  # the SPEC that is taken where none is given

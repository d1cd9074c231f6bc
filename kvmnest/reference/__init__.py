"""The reference target: L1 on the bare CPU that Bochs emulates, no Linux and no KVM between.

It has the shape of ``kvmnest.kvm``: a system object, a VM, a vCPU. What needs a host (another
memory slot, nested state, an exit to userspace, an event from outside) raises ``NeedsHost``.
"""

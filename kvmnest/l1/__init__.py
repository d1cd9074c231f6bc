"""L1: the bare-metal hypervisor in a VM, driven one instruction at a time."""

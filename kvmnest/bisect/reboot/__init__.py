"""Bisection on bare metal: the kernels under test are booted on this machine, one after another."""

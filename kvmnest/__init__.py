"""kvmnest: a KVM nested-guest test harness."""

__version__ = "0.1.0"

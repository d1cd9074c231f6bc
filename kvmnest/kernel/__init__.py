"""Builds KVM's modules from Debian's kernel source, with or without edits."""

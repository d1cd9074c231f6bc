"""Real bugs of nested VMX, each with the case that tells whether a kernel has it."""

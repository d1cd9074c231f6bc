"""Programs: sequences of VMX instructions, VM entries and host actions, drawn from a seed."""

"""What this machine, or a kernel in the lab, offers: readiness and VMX capabilities."""

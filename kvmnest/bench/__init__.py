"""How fast L1 works, as ratios to a bare KVM_RUN in the same run."""

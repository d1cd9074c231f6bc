"""The suite on many kernels and settings: running it, and what differs between neighbours."""

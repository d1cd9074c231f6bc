"""Bugs that kernels of today have, as ``kvmnest found`` lists them; each script has its fix."""

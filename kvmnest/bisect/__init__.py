"""Which kernel, or which commit, changed the outcome of a case."""

"""One case, command by command: what one would paste into a bug report."""

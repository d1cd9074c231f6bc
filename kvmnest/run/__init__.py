"""Running cases: on which target, which of them, in how many processes; events in, results out."""

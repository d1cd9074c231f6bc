"""Results of a run: events in, JSON, JUnit and a summary out."""

"""A Python prompt with a live L1."""

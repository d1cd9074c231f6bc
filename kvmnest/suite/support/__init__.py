"""Helpers that several files of the suite share."""

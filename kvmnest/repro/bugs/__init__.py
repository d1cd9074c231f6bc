"""The reproducers: one script for each bug, named by its id. See kvmnest/docs/reproducers.md."""

"""Real bugs of nested VMX, each with a small script that tells whether a kernel has it.

``bugs`` holds the scripts, ``corpus`` reads them (and a user's own), ``check`` runs them and
judges, ``verify`` shows them both ways, ``evidence`` is the record of that.
"""

from kvmnest.repro.bug import Bug

__all__ = ["Bug"]

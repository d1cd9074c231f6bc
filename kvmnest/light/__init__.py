"""The suite in the lab without pytest: what is as slow there as the cases themselves.

pytest collects on the host and writes a plan (``plan``, a plugin); the modules as it compiled them
go along (``compiled``). In the guest ``runner`` runs the plan, with ``standin`` in pytest's place
and ``rewrite`` in that of its assertion rewriting. Whatever these cannot run, pytest runs in the
guest: files of the user, marks and fixtures that ``plan`` does not know.

Why it is here: pytest alone was tried in November 2026, from a saved session that had started and
had collected the suite, with one result for each case in place of three reports. 585 cases of 26
files on 7.3.4 in one lab, all with the same outcomes, in seconds of CPU:

=========================================  ============  =====
.                                          this package  pytest
=========================================  ============  =====
another run on the same kernel             102           98
the first run on a kernel                  102           141
=========================================  ============  =====

The 43 s are the collection in the guest (0.9 s on the host) and its snapshot. Each kernel, CPU
model and set of parameters of KVM needs its own, and so does each edit of kvmnest: in a matrix, a
ladder of kernels or CI every run is a first one, whose first case ends 40 s later.
"""

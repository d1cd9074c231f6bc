"""The conformance suite: one file per subject, every case names its SDM section title.

``kvmnest run`` collects it; plain pytest does too, with ``--pyargs kvmnest.suite``.
"""

"""Broken KVMs, and how many of them the suite notices.

``catalogue`` reads the edits, ``score`` builds each and runs cases on it in the lab, ``record``
keeps what came out.
"""

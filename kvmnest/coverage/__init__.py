"""Which lines of KVM ran: modules built with gcc's trace-pc, and what they tell.

``build`` makes the modules, ``blocks`` reads from them where each basic block begins, ``collect``
takes the addresses from the kernel that runs, ``record`` keeps, joins and compares what came of
it, ``text`` and ``page`` show it.
"""

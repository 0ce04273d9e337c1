"""How KVM's x86 MMU repairs a guest's page fault: the package behind the book *Fast Page Fault*.

Each module holds one idea and imports only modules on the floors below its own:

==== ================= =====================================================================
0    ``bits``          named bit layouts over uint64 scalars and arrays
1    ``pfec``          page-fault error codes, EPT and NPT codes turned into them  (chapter 2)
1    ``trace``         kernel trace text to arrays  (chapters 2 and 13)
2    ``paging``        the permission rules of a page walk, whole arrays at once  (chapter 2)
2    ``program``       a protocol as readable steps on shared words  (chapters 5 to 10)
2    ``readers``       walks and the freeing of tables in time: grace periods, flushes  (chapter 5)
3    ``explore``       every interleaving of a program, under SC and x86-TSO  (chapters 5 to 10)
4    ``board``         a state graph to look at: games, schedules, walls  (chapters 6 to 10)
5    ``figures``       the book's pictures; imports matplotlib
5    ``diagrams``      the pictures of races
5    ``widgets``       the book's players; imports anywidget
5    ``exercise``      exercises that check themselves
6    ``__main__``      ``python -m mmu``
==== ================= =====================================================================

``import mmu`` needs numpy alone.
"""

__version__ = "0.1.0"

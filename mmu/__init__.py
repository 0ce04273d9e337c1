"""How KVM's x86 MMU repairs a guest's page fault: the package behind the book *Fast Page Fault*.

Each module holds one idea, says it in its first line, and imports only modules that stand before it here:

========= ===========================================================================================================
words     ``bits`` ``formats`` ``pfec`` ``spte`` ``update``: error codes and page-table entries, bit by bit (2, 3)
traces    ``scan`` ``records`` ``trace`` ``handling`` ``infer`` ``histories`` ``reading`` ``progress`` ``ledger``
          ``symptoms`` ``timeline`` ``report_page`` ``report``: kernel text to arrays, and what they show (1, 4, 13)
paging    ``paging`` ``codetable`` ``tables`` ``nested``: the rules of a page walk, and walks by the million (2, 5)
races     ``program`` ``protocols`` ``today`` ``placing`` ``machine`` ``hashset`` ``space`` ``quotient`` ``explore``
          ``board`` ``litmus`` ``explore_cli``: protocols as text, and every interleaving of them (5 to 10, 12)
machine   ``host`` ``slots`` ``kernel`` ``direct`` ``shadow`` ``vm`` ``scenario`` ``places`` ``walks`` ``play``
          ``explain`` ``replay``: a simulated guest, held against recordings (4)
rules     ``values`` ``chains`` ``order`` ``elements`` ``exits`` ``conform`` ``check`` ``causes``: what a trace may
          say, and what it must not (4, 13)
time      ``published`` ``queueing`` ``trials`` ``workload`` ``rounds`` ``cost`` ``sweep`` ``readers``: what faults,
          locks and waiting cost (1, 5, 11)
book      ``picture`` ``figures`` ``prices`` ``diagrams`` ``graces`` ``charts`` ``measured`` ``answers``
          ``faultlanes`` ``exercise`` ``widgets``: pictures, exercises and players; they need matplotlib and anywidget
commands  ``__main__``: ``python -m mmu``
========= ===========================================================================================================

``import mmu`` needs numpy alone; the numbers are those of chapters.
"""

__version__ = "0.1.0"

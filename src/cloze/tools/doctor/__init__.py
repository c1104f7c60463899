"""`cloze doctor`: check the machines and the network between them before training.

    this_process --> meeting --> facts, folder, links --> judge --> report
    rank, address    the store   measured by each rank    rows      the table

Each process examines its own machine; rank 0 collects, judges and prints. The facts are plain JSON, so those of any
cluster can be judged again.
"""

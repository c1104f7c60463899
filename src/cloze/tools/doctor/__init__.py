"""`cloze doctor`: check the machines and the network between them before training.

    place --> meeting --> facts, folder, links --> judge --> report
    who am I,  the store   what each process finds  rows      the table

Each process finds out about its own machine; rank 0 collects, judges and prints. What is judged is plain JSON, so that
any cluster's facts can be looked at again.
"""

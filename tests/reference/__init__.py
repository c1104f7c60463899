"""A second implementation of what decides the numbers of a run, in plain Python and PyTorch.

It is written from the module docstrings of Cloze, imports nothing of Cloze, and prefers the obvious to the fast: whole
numbers of Python in place of 64-bit arrays, one block at a time, float64. Tests compare it with Cloze step by step.
"""

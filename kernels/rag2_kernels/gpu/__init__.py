"""Triton kernels, one operation a file; imported where they are asked for, never before.

Type checkers see a `triton.jit` function as the Python that it is written in, not as what it is
launched with: files with kernels turn those complaints off.
"""

"""Solvers of checked problems. Only they know the compiled kernels."""

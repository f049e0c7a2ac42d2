"""Compiled kernels and the threads that run them; imported only by the transports that need them."""

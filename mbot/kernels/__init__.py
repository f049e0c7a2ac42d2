"""Compiled kernels and the threads that run them; imported only by the solvers that need them.

Kernels leave out problems whose costs are not finite, or a few of them so huge that float64 has no digits left for the
others (see `mbot.kernels.assignment.unusual`), unless told that costs are capped. The limits are set here.
"""

LARGEST_COST = 1e302  # magnitude; sums of costs must not overflow
SAMPLE = 32  # entries of a problem that are examined
HUGE = 1e7  # how much further the mean is above the least cost than a small entry
SMALL = 8  # one entry in so many is small

"""Passive waiting of torch's threads, on the command line; imported before torch, which reads the setting when loaded.

Threads of torch's OpenMP library spin for milliseconds between parallel operations. Where another process wants the
core, each operation then waits for the scheduler; sleeping threads do not. A setting of the user's stays.
"""

import os
import sys

if sys.argv[:1] == ["-m"]:  # `python -m flows` imports its package, before the arguments are known
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

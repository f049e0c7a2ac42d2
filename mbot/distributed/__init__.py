"""Several processes: couplings over the batch of all of them, and losses whose grid of problems is spread over them.

On ``torch.distributed`` alone: initialise a process group with a ``timeout=``, and every call is made by all its ranks.
 A rank that dies or hangs ends the call with an error on the others, at the timeout at the latest. Inputs are
checked on every rank before anything is exchanged, and an error on one is raised on all.
"""

from mbot.distributed.couplings import GlobalCoupling, GlobalPairs
from mbot.distributed.losses import spread
from mbot.distributed.semidiscrete import fit

__all__ = ["GlobalCoupling", "GlobalPairs", "fit", "spread"]

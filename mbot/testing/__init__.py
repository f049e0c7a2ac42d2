"""The contracts of transports and couplings: checks that raise an AssertionError with the input that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mbot.couplings import Coupling
from mbot.solvers import fast_paths
from mbot.testing.couplings import COUPLING_CHECKS
from mbot.testing.tools import check_settings, require
from mbot.testing.transports import TRANSPORT_CHECKS
from mbot.transport import Transport


def check_transport(transport: Transport, *, device: torch.device | str = "cpu") -> None:
    """Check that a transport keeps the promises that losses and couplings count on.

    Plans have the shape, dtype and device of the costs, non-negative masses, and sums that agree with their entries; a
    batch is its problems one by one, and no problems have no plans; the same call gives the same plan; renamed points
    give the renamed plan; a point of weight zero is as if it were not there; inputs stay as they are; gradients in the
    points are those of the value, and so are those in the weights and second derivatives, or they are an error (finite
    differences in float64); a callable cost and a named one agree; half precision is computed in float32;
    ``uniform_mass`` is the plan's, and ``entropic_reg`` its regularisation, where there are any; settings are frozen,
    compare, hash, pickle and print.

    Args:
        transport: the transport, at the settings to check: with a tolerance far below 1e-6, if it iterates.
        device: where the costs are.

    Raises:
        AssertionError: a promise that is not kept, with the input that shows it.

    >>> check_transport(mbot.ExactOT())
    """
    require(isinstance(transport, Transport), f"a transport is derived from mbot.Transport; got {transport!r}")
    device = torch.device(device)
    check_settings(transport)
    hash(transport)
    for check in TRANSPORT_CHECKS:
        check(transport, device)


def check_coupling(coupling: Coupling, *, device: torch.device | str = "cpu") -> None:
    """Check that a coupling keeps the promises that flow matching and loaders count on.

    Pairs are int64 indices in range, on the samples' device, and give the samples by ``apply``; weights are
    non-negative with mean 1 and no gradient; equal inputs and generators give equal pairs, whatever was coupled before
    and whatever torch's own generator holds; inputs stay as they are, contiguous or not; unequal batches are paired or
    refused with a ValueError; bad samples are refused; ``entropic_reg`` is None, NaN, or above 0; settings are frozen,
    compare, pickle and print.

    Args:
        coupling: the coupling, at the settings to check. It gets integer classes as the targets' conditions.
        device: where the samples are.

    Raises:
        AssertionError: a promise that is not kept, with the input that shows it.

    >>> check_coupling(mbot.OTCoupling())
    """
    require(isinstance(coupling, Coupling), f"a coupling is derived from mbot.Coupling; got {coupling!r}")
    device = torch.device(device)
    check_settings(coupling)
    for check in COUPLING_CHECKS:
        check(coupling, device)


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """Inside, small problems take the general route instead of a compiled short cut, in this thread: to compare them.

    >>> with without_fast_paths():
    ...     reference = mbot.EntropicOT(0.1).plan(torch.rand(5, 5))
    """
    token = fast_paths.set(False)
    try:
        yield
    finally:
        fast_paths.reset(token)

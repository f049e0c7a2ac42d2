"""Every transport and coupling that the package exports, with the settings its contract is tested at.

A class joins by being in ``mbot.__all__`` and having a line here; a missing line fails `test_everything_has_a_case`.
"""

import inspect

import mbot

TRANSPORTS = {
    "EntropicOT": [mbot.EntropicOT(reg=0.5, tol=1e-11)],
    "ExactOT": [mbot.ExactOT(), mbot.ExactOT(solver="network_simplex")],
    "PartialOT": [mbot.PartialOT(mass=0.6), mbot.PartialOT(mass=0.6, reg=0.5, tol=1e-11)],
    "UnbalancedOT": [mbot.UnbalancedOT(reg=0.5, reg_marginal=1.0, tol=1e-11)],
}

# Values only: no plan, no cost matrix.
VALUES_ONLY = {"SlicedOT": [mbot.SlicedOT(num_projections=16), mbot.SlicedOT(num_projections=16, p=1.5)]}

COUPLINGS = {
    "IndependentCoupling": [mbot.IndependentCoupling()],
    "OTCoupling": [
        mbot.OTCoupling(),
        mbot.OTCoupling(cost="euclidean"),
        mbot.OTCoupling(mbot.PartialOT(mass=0.7), refill="independent"),
        mbot.OTCoupling(mbot.PartialOT(mass=0.7)),
        mbot.OTCoupling(mbot.PartialOT(mass=0.7, reg=0.5), refill="sampled"),
        mbot.OTCoupling(mbot.EntropicOT(reg=0.5)),
        mbot.OTCoupling(mbot.UnbalancedOT(reg=0.5, reg_marginal=2.0)),
        mbot.OTCoupling(replacement=True),
    ],
    "BoMbCoupling": [
        mbot.BoMbCoupling(num_batches=3),
        mbot.BoMbCoupling(mbot.EntropicOT(reg=0.5), num_batches=5, reg=0.2),
    ],
    "ConditionalOTCoupling": [
        mbot.ConditionalOTCoupling("discrete"),
        mbot.ConditionalOTCoupling("continuous", weight=3.0, condition_cost="sqeuclidean"),
        mbot.ConditionalOTCoupling("continuous", target_ratio=0.1, condition_cost="sqeuclidean"),
    ],
    "DataCoupling": [mbot.DataCoupling(), mbot.DataCoupling(conditional=True, num_noises=2, refresh=3)],
    "NearestNoiseCoupling": [mbot.NearestNoiseCoupling(), mbot.NearestNoiseCoupling(1), mbot.NearestNoiseCoupling(50)],
    "SinkhornCoupling": [mbot.SinkhornCoupling(reg=0.5), mbot.SinkhornCoupling(reg=1.0, relative=False, cells=20)],
    "SemidiscreteCoupling": [
        mbot.SemidiscreteCoupling(steps=20, batch_size=16),
        mbot.SemidiscreteCoupling(conditional=True, steps=20, batch_size=16),
        mbot.SemidiscreteCoupling(balanced=True, reg=0.3, stop_at=0.1, steps=20, batch_size=16),
    ],
    "WeightedCoupling": [
        mbot.WeightedCoupling(reg=1.0),
        mbot.WeightedCoupling(reg=1.0, cost="dot", correction="sinkhorn"),
    ],
}

CONDITIONAL = {"ConditionalOTCoupling"}

# Couplings that draw: renaming the samples renames the pairs in distribution only.
_DRAWING = [
    case for name in ("SinkhornCoupling", "SemidiscreteCoupling", "NearestNoiseCoupling") for case in COUPLINGS[name]
]
_OPTIMAL = [c for c in COUPLINGS["OTCoupling"] if c.replacement or not isinstance(c.transport, mbot.ExactOT)]
RANDOM = _OPTIMAL + _DRAWING + COUPLINGS["BoMbCoupling"]

# Couplings that may leave a sample out, and use another one twice.
UNEVEN = [c for c in _OPTIMAL if c.refill != "independent"] + _DRAWING


def exported(base):
    """Names of the concrete subclasses of ``base`` in ``mbot.__all__``."""
    objects = {name: getattr(mbot, name) for name in mbot.__all__}
    return {n for n, o in objects.items() if inspect.isclass(o) and issubclass(o, base) and o is not base}


def flat(table):
    return [case for cases in table.values() for case in cases]

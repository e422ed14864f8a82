"""How sparse weights come from dense ones, and how their gradient goes back.

θ = m ⊙ ψ(z): the network has the weights θ, the optimizer moves the latent weights z.
A method is a value of few parts: a curve ψ, how the mask m moves, which entries get a
gradient, and a penalty on the latent weights.  Parts combine: `dataclasses.replace(
power_propagation(2.0), hysteresis=0.1)` is both.
"""

from ._params import latent_params, sparse_params
from ._reparametrizations import (
    Curve,
    Identity,
    Penalty,
    Power,
    Reparametrization,
    Sets,
    SoftThreshold,
    Threshold,
    power_propagation,
    soft_threshold,
    sr_ste,
    straight_through,
    surgery,
    top_kast,
)

__all__ = [
    "Curve",
    "Identity",
    "Penalty",
    "Power",
    "Reparametrization",
    "Sets",
    "SoftThreshold",
    "Threshold",
    "latent_params",
    "power_propagation",
    "soft_threshold",
    "sparse_params",
    "sr_ste",
    "straight_through",
    "surgery",
    "top_kast",
]


def __dir__() -> list[str]:
    return __all__

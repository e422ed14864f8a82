"""How sparse weights follow from dense ones, and how the gradient goes back.

θ = m ⊙ ψ(z): the network uses the weights θ, and the optimizer moves the latent weights
z, which only the state of `clipjax.latent` holds.

| you want ...                                      | use                              |
| ------------------------------------------------- | -------------------------------- |
| every latent weight to go on learning             | `straight_through`               |
| the same, with pruned ones decayed                | `sr_ste`                         |
| gradients for few entries only                    | `top_kast`                       |
| masks that change reluctantly                     | `surgery`                        |
| a threshold that is learned, or fixed             | `soft_threshold`                 |
| small weights that stay small                     | `power_propagation`              |
| to read the state                                 | `latent_params`, `sparse_params` |

Each is a `Reparametrization`: a curve ψ, how the mask m moves, which entries get a
gradient, and a penalty on z.  These combine, as in
`dataclasses.replace(power_propagation(2.0), hysteresis=0.1)`.
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

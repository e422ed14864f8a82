"""The transforms that the contract is tested on: one row for each `update` there is.

What is made of the same closure by other arguments needs no row: its own tests say
what it computes.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import clipjax
from clipjax import compression, contrib, norms, prox
from clipjax._core import trees

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Row:
    """A transform, and what has to be known of it to test it as every other."""

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    tuned: Mapping[str, Any]  # the argument that users tune, and a value of it
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    static: tuple[str, ...] = ()  # what `inject_hyperparams` must leave alone
    reads_params: bool = False
    last: bool = False  # emits -θ or a difference of parameters: after the optimizer
    differences: bool = False  # has rounding errors of the size of what it subtracts
    cannot: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def make(self, value=None, **options):
        """Builds it, with another value of its first argument if one is given."""
        known = inspect.signature(self.factory).parameters
        options = {name: x for name, x in options.items() if name in known}
        tuned = dict(self.tuned)
        if value is not None:
            tuned[self.argument] = value
        return self.factory(**tuned, **self.options, **options)

    @property
    def argument(self):
        return next(iter(self.tuned))

    @functools.cached_property
    def tx(self):
        return self.make()

    @property
    def update(self):
        """Outside of a trace it compiles itself, once for each kind of arguments."""
        return self.tx.update

    @functools.cached_property
    def update_with(self):
        """Takes the value of the first argument too."""
        return jax.jit(lambda value, *arguments: self.make(value).update(*arguments))


def _floats(function):
    """Maps over floating leaves; others pass, which few optimizers allow."""

    def one(leaf, *rest):
        return function(leaf, *rest) if trees.is_float(leaf) else leaf

    return lambda tree, *rest: jax.tree.map(one, tree, *rest)


CLAMP = optax.stateless(
    lambda updates, params: _floats(
        lambda u: jnp.clip(u, *jnp.asarray([-0.5, 0.5], u.dtype))
    )(updates)
)
"""An optimizer without a state."""


def _momentum(updates, state, params=None):
    del params

    def moment(u, m):
        if u is None or not trees.is_float(u):
            return m
        return u + m * jnp.asarray(0.5, m.dtype)

    def is_missing(u):
        return u is None

    state = jax.tree.map(moment, updates, state, is_leaf=is_missing)
    return jax.tree.map(
        lambda u, m: None if u is None else m if trees.is_float(u) else u,
        updates,
        state,
        is_leaf=is_missing,
    ), state


MOMENTUM = optax.GradientTransformation(_floats(jnp.zeros_like), _momentum)
"""One with moments, which a bad step must not reach."""


def _carried(max_delta, *, axis_name=None):
    return clipjax.carry_clipped(clipjax.clip(max_delta), axis_name=axis_name)


def _greedy(threshold, *, axis_name=None):
    """Finds its loss by itself, as no wrapper of Optax hands it a `value_fn`."""
    tx = contrib.greedy_clip(MOMENTUM, [threshold, jnp.inf], axis_name=axis_name)
    loss = functools.partial(norms.global_norm, axis_name=axis_name)

    def update(updates, state, params=None, **extra_args):
        return tx.update(updates, state, params, **extra_args, value_fn=loss)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _around(inner, factory):
    return functools.partial(factory, inner)


ALL_AT_ONCE = {
    "a mesh": "a Gram matrix is exchanged, which is more than a norm",
    "shard_map": "a split matrix has to be described by `specs`",
}
OWN_MASKS = {"shard_map": "every device draws a random mask of its own"}
NO_NUMBER = dict.fromkeys(
    ("a population", "a schedule", "injected"), "it has no number to tune"
)
TRANSFORMS = {
    "clip": Row(clipjax.clip, {"max_delta": 0.5}),
    "clip_by_global_norm": Row(clipjax.clip_by_global_norm, {"max_norm": 0.5}),
    "adaptive_grad_clip": Row(
        clipjax.adaptive_grad_clip, {"clipping": 0.1}, reads_params=True
    ),
    "adaptive_clip": Row(clipjax.adaptive_clip, {"factor": 0.5}, static=("window",)),
    "adaptive_clip_units": Row(
        clipjax.adaptive_clip,
        {"ratio": 0.02},
        static=("window",),
        reads_params=True,
    ),
    "spectral_clip": Row(
        clipjax.spectral_clip,
        {"max_norm": 0.5},
        cannot=ALL_AT_ONCE,
    ),
    "skip_spikes": Row(
        _around(MOMENTUM, clipjax.skip_spikes),
        {"factor": 3.0},
        static=("window", "max_consecutive"),
    ),
    "reset_moments": Row(
        _around(MOMENTUM, clipjax.reset_moments),
        {"warmup": 4.0},
        {"every": 2, "on_spike": clipjax.thresholds.WindowedQuantile(factor=5.0)},
        reads_params=True,
    ),
    "carry_clipped": Row(_carried, {"max_delta": 0.5}),
    "greedy_clip": Row(
        _greedy, {"threshold": 0.5}, reads_params=True, differences=True
    ),
    "sparsify": Row(clipjax.sparsify, {"sparsity": 0.6}, reads_params=True, last=True),
    "sparse": Row(
        _around(CLAMP, clipjax.sparse),
        {"sparsity": 0.6},
        reads_params=True,
        last=True,
    ),
    "rigl": Row(
        _around(CLAMP, clipjax.rigl),
        {"sparsity": 0.6},
        {"key": KEY, "total_steps": 1e9, "every": 1},
        reads_params=True,
        last=True,
        cannot=OWN_MASKS,
    ),
    "latent": Row(
        _around(CLAMP, clipjax.latent),
        {"sparsity": 0.6},
        reads_params=True,
        last=True,
    ),
    "proximal": Row(
        clipjax.proximal,
        {"learning_rate": 0.3},
        {"penalty": prox.L1(2.0)},
        reads_params=True,
        last=True,
        differences=True,
    ),
    "rewinding": Row(
        _around(CLAMP, contrib.rewinding),
        {"rate": 0.6},
        {"every": 2, "rounds": 1},
        reads_params=True,
        last=True,
        differences=True,
        cannot={"going on": "a bad step is one of the round"},
    ),
    "regularized_dual_averaging": Row(
        contrib.regularized_dual_averaging,
        {"learning_rate": 0.5},
        {"l1": 0.4},
        reads_params=True,
        last=True,
        differences=True,
    ),
    "error_feedback": Row(
        _around(compression.top_k(0.6), compression.error_feedback),
        {"decay": 0.6},
        differences=True,
    ),
    "deep_gradient_compression": Row(
        contrib.deep_gradient_compression,
        {"sparsity": 0.6},
        static=("stage_steps",),
        differences=True,
    ),
    "keep_zeros": Row(
        clipjax.constraints.keep_zeros,
        {},
        reads_params=True,
        last=True,
        cannot=NO_NUMBER,
    ),
}

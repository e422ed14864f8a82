"""A training step on 12.6 million parameters with each sparse method, against Adam.

Every call takes 100 steps with one search for a mask.  JaxPruner's rule for pruning by
magnitude is restated here, as it cannot run on today's JAX: masks by `argsort`, a uint8
for each parameter, and a multiplication.  The sides take turns.
"""

import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import clipjax

from . import steps, timing

SPARSITY = 0.9
EVERY = steps.EVERY


class PeerState(NamedTuple):
    """What JaxPruner's wrapper holds."""

    masks: Any
    inner: Any
    count: jax.Array


def peer(inner):
    """Restates JaxPruner's magnitude pruning around an optimizer.

    Its users call `post_gradient_update` after the step; here the product stands in the
    update, so that both sides are one optax transform.
    """

    def mask_of(param):
        if param.ndim < 2:
            return jnp.ones(param.shape, jnp.uint8)
        order = jnp.argsort(-jnp.abs(param).reshape(-1))
        kept = order[: round(param.size * (1 - SPARSITY))]
        mask = jnp.zeros(param.size, jnp.uint8).at[kept].set(1)
        return mask.reshape(param.shape)

    def init(params):
        masks = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.uint8), params)
        return PeerState(masks, inner.init(params), jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        due = state.count % EVERY == 0
        masks = jax.lax.cond(
            due, lambda: jax.tree.map(mask_of, params), lambda: state.masks
        )
        updates, inner_state = inner.update(updates, state.inner, params)
        updates = jax.tree.map(
            lambda u, p, m: (p + u) * m.astype(p.dtype) - p, updates, params, masks
        )
        return updates, PeerState(masks, inner_state, state.count + 1)

    return optax.GradientTransformation(init, update)


def methods():
    """Returns every method around or behind Adam, and the bound that is asked."""
    adam, key = optax.adam(1e-3), jax.random.key(0)
    masks = clipjax.masks
    moves = {"every": EVERY, "key": key}
    return {
        "`sparsify`, bits": (
            optax.chain(adam, clipjax.sparsify(SPARSITY, every=EVERY)),
            1.03,
        ),
        "`sparsify`, nothing stored": (
            optax.chain(
                adam, clipjax.sparsify(SPARSITY, every=EVERY, storage=masks.Zeros())
            ),
            1.03,
        ),
        "`sparse`": (clipjax.sparse(adam, SPARSITY, every=EVERY), 1.03),
        "`static_sparse`": (clipjax.static_sparse(adam, SPARSITY, key=key), None),
        "`sparse_evolutionary`": (
            clipjax.sparse_evolutionary(adam, SPARSITY, **moves),
            None,
        ),
        "`rigl`": (clipjax.rigl(adam, SPARSITY, total_steps=10**6, **moves), None),
        "`latent`, straight-through": (
            clipjax.latent(adam, SPARSITY, every=EVERY),
            None,
        ),
        "JaxPruner's rule": (peer(adam), None),
    }


def bytes_a_parameter(tx):
    """Returns the bytes of state for each parameter beyond Adam's."""
    params = jax.eval_shape(lambda: steps.tree(jax.random.key(0), 1.0))

    def size(tx):
        state = jax.eval_shape(tx.init, params)
        return sum(
            x.size * (1 if x.dtype == bool else x.dtype.itemsize)
            for x in jax.tree.leaves(state)
            if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        )

    entries = sum(x.size for x in jax.tree.leaves(params))
    return (size(tx) - size(optax.adam(1e-3))) / entries


def table(*, rounds=5):
    """Returns the table as Markdown."""
    lines = [
        "| method | ms | Adam alone, ms | ratio | asked | bytes a parameter |",
        "| ------ | -: | -------------: | ----: | ----: | ----------------: |",
    ]
    for name, (tx, bound) in methods().items():
        sides = {
            "ours": steps.Side(tx, EVERY),
            "adam": steps.Side(optax.adam(1e-3), EVERY),
        }
        times = timing.interleaved(sides, rounds=rounds)
        middle = {side: statistics.median(t) / EVERY for side, t in times.items()}
        lines.append(
            f"| {name} | {middle['ours']:.2f} | {middle['adam']:.2f} |"
            f" {timing.ratio(times, 'ours', 'adam'):.3f} | {bound or ''} |"
            f" {bytes_a_parameter(tx):.3f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

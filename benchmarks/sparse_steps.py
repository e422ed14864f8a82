"""A training step on 12.6 million parameters with each sparse method, against Adam.

Every call takes 100 steps with one search for a mask.  JaxPruner's rules are restated
here, as it cannot run on today's JAX: masks by `argsort`, a uint8 for each parameter,
and a multiplication.  The sides take turns.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import clipjax
from clipjax import contrib

from . import steps, timing

SPARSITY = 0.9
EVERY = steps.EVERY
DROPPED = 0.1  # of what is kept, in a move

Rule = Callable[..., jax.Array]
"""From a parameter, its gradient, its mask and a key to a new mask, a uint8 each."""


class PeerState(NamedTuple):
    """What JaxPruner's wrapper holds."""

    masks: Any
    inner: Any
    count: jax.Array


def peer(inner, rule, *, dense_start=True, moves=False):
    """Restates a method of JaxPruner around an optimizer.

    Its users call `post_gradient_update` after the step; here the product stands in the
    update, so that both sides are one optax transform.

    Args:
        inner: the optimizer, of Adam's kind.
        rule: makes a mask.
        dense_start: whether all is kept at first, or a random part.
        moves: whether gradients are masked, and moments of what grows set to zero.
    """

    def init(params):
        def start(i, param):
            if dense_start or param.ndim < 2:
                return jnp.ones(param.shape, jnp.uint8)
            return by_rank(jax.random.uniform(jax.random.key(i), param.shape))

        leaves, structure = jax.tree.flatten(params)
        masks = jax.tree.unflatten(structure, [start(*x) for x in enumerate(leaves)])
        return PeerState(masks, inner.init(params), jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        def made(param, grad, mask):
            key = jax.random.fold_in(jax.random.key(0), state.count)
            return rule(param, grad, mask, key) if param.ndim > 1 else mask

        def search():
            masks = jax.tree.map(made, params, updates, state.masks)
            if not moves:
                return masks, state.inner
            grown = jax.tree.map(lambda new, old: new > old, masks, state.masks)
            adam, *others = state.inner
            mu, nu = (
                jax.tree.map(lambda g, x: jnp.where(g, 0, x), grown, moments)
                for moments in (adam.mu, adam.nu)
            )
            return masks, (adam._replace(mu=mu, nu=nu), *others)

        due = state.count % EVERY == 0
        masks, inner_state = jax.lax.cond(
            due, search, lambda: (state.masks, state.inner)
        )
        if moves:
            updates = jax.tree.map(lambda u, m: u * m.astype(u.dtype), updates, masks)
        updates, inner_state = inner.update(updates, inner_state, params)
        updates = jax.tree.map(
            lambda u, p, m: (p + u) * m.astype(p.dtype) - p, updates, params, masks
        )
        return updates, PeerState(masks, inner_state, state.count + 1)

    return optax.GradientTransformation(init, update)


def by_rank(scores, kept=None):
    """Restates how JaxPruner keeps the highest scores."""
    size = round(scores.size * (1 - SPARSITY)) if kept is None else kept
    order = jnp.argsort(-scores.reshape(-1))
    mask = jnp.zeros(scores.size, jnp.uint8).at[order[:size]].set(1)
    return mask.reshape(scores.shape)


def moved(param, mask, growth):
    """Drops the smallest of what is kept, and grows as many."""
    kept = round(param.size * (1 - SPARSITY))
    stay = kept - round(kept * DROPPED)
    left = by_rank(jnp.where(mask > 0, jnp.abs(param), -1), stay)
    grown = by_rank(jnp.where(left > 0, -jnp.inf, growth), kept - stay)
    return left | grown


def magnitude(param, grad, mask, key):
    """Keeps the largest."""
    del grad, mask, key
    return by_rank(jnp.abs(param))


def unchanged(param, grad, mask, key):
    """Keeps what it kept."""
    del param, grad, key
    return mask


def evolving(param, grad, mask, key):
    """Grows at random, as SET does."""
    del grad
    return moved(param, mask, jax.random.uniform(key, param.shape))


def by_gradient(param, grad, mask, key):
    """Grows where gradients are large, as RigL does."""
    del key
    return moved(param, mask, jnp.abs(grad))


def methods():
    """Returns every method around or behind Adam, the bound asked, and its peer."""
    adam, key = optax.adam(1e-3), jax.random.key(0)
    zeros, booleans = clipjax.masks.Zeros(), clipjax.masks.Booleans()
    moves = {"every": EVERY, "key": key}
    projected = peer(adam, magnitude)
    return {
        "`sparsify`, bits": (
            optax.chain(adam, clipjax.sparsify(SPARSITY, every=EVERY)),
            1.03,
            projected,
        ),
        "`sparsify`, nothing stored": (
            optax.chain(adam, clipjax.sparsify(SPARSITY, every=EVERY, storage=zeros)),
            1.03,
            projected,
        ),
        "`sparsify`, Booleans": (
            optax.chain(
                adam, clipjax.sparsify(SPARSITY, every=EVERY, storage=booleans)
            ),
            1.03,
            projected,
        ),
        "`sparse`": (clipjax.sparse(adam, SPARSITY, every=EVERY), 1.03, projected),
        "`sparse`, elementwise": (
            clipjax.sparse(adam, SPARSITY, every=EVERY, elementwise=True),
            1.03,
            projected,
        ),
        "`sparse`, elementwise, Booleans": (
            clipjax.sparse(
                adam, SPARSITY, every=EVERY, storage=booleans, elementwise=True
            ),
            1.03,
            projected,
        ),
        "`static_sparse`": (
            clipjax.static_sparse(adam, SPARSITY, key=key),
            None,
            peer(adam, unchanged, dense_start=False, moves=True),
        ),
        "`static_sparse`, elementwise": (
            clipjax.static_sparse(adam, SPARSITY, key=key, elementwise=True),
            None,
            peer(adam, unchanged, dense_start=False, moves=True),
        ),
        "`sparse_evolutionary`": (
            contrib.sparse_evolutionary(adam, SPARSITY, **moves),
            None,
            peer(adam, evolving, dense_start=False, moves=True),
        ),
        "`rigl`": (
            clipjax.rigl(adam, SPARSITY, total_steps=10**6, **moves),
            None,
            peer(adam, by_gradient, dense_start=False, moves=True),
        ),
        "`latent`, straight-through": (
            clipjax.latent(adam, SPARSITY, every=EVERY),
            None,
            None,
        ),
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
        "| method | ms | Adam alone, ms | ratio | asked | JaxPruner's rule, ratio |"
        " bytes a parameter | JaxPruner's |",
        "| ------ | -: | -------------: | ----: | ----: | ----------------------: |"
        " ----------------: | ----------: |",
    ]
    for name, (tx, bound, rival) in methods().items():
        sides = {"ours": tx, "adam": optax.adam(1e-3)}
        if rival is not None:
            sides["peer"] = rival
        sides = {side: steps.Side(tx, EVERY) for side, tx in sides.items()}
        times = timing.interleaved(sides, rounds=rounds)
        middle = {side: statistics.median(t) / EVERY for side, t in times.items()}
        theirs = bytes_of_theirs = ""
        if rival is not None:
            theirs = f"{timing.ratio(times, 'peer', 'adam'):.2f}"
            bytes_of_theirs = f"{bytes_a_parameter(rival):.3f}"
        lines.append(
            f"| {name} | {middle['ours']:.2f} | {middle['adam']:.2f} |"
            f" {timing.ratio(times, 'ours', 'adam'):.3f} | {bound or ''} | {theirs} |"
            f" {bytes_a_parameter(tx):.3f} | {bytes_of_theirs} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

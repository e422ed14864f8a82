"""The k-th largest magnitude: clipjax against a top-k, sorts and NumPy."""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

import clipjax

from . import timing

_OURS = "clipjax.selection.kth_largest"
_MASK = "clipjax.selection.largest"


def _by_argsort(x, *, k):
    """Makes the mask as JaxPruner does."""
    order = jnp.argsort(-jnp.abs(x))
    return jnp.zeros(x.shape, jnp.uint8).at[order[:k]].set(1)


def measured(size, *, rounds):
    """Times all sides at one size, the slow ones apart from the fast."""
    x = jax.random.normal(jax.random.key(0), (size,))
    host, k = np.asarray(x), size // 10
    ours = functools.partial(jax.jit(clipjax.selection.kth_largest), x, jnp.int32(k))
    mask = functools.partial(jax.jit(clipjax.selection.largest), x, jnp.int32(k))
    norm = functools.partial(jax.jit(lambda x: jnp.sqrt(jnp.sum(jnp.square(x)))), x)
    top = functools.partial(jax.jit(lambda x: jax.lax.top_k(jnp.abs(x), k)[0][-1]), x)
    ordered = functools.partial(jax.jit(lambda x: jnp.sort(jnp.abs(x))[-k]), x)
    ranked = functools.partial(jax.jit(functools.partial(_by_argsort, k=k)), x)
    assert (ranked() == mask()).all()
    assert ours() == top() == ordered() == np.sort(np.abs(host))[-k]
    fast = {
        _OURS: ours,
        _MASK: mask,
        "numpy.partition": lambda: np.partition(np.abs(host), size - k),
        "one l2 norm": norm,
    }
    slow = {
        "jax.lax.top_k": top,
        "jax.numpy.sort": ordered,
        "a mask by jax.numpy.argsort": ranked,
        _OURS: ours,
        _MASK: mask,
    }
    return (
        timing.interleaved(fast, rounds=2 * rounds),
        timing.interleaved(slow, rounds=rounds),
    )


def table(sizes=(10**6, 10**7), *, rounds=9):
    """Returns the table as Markdown."""
    lines = [
        "| n | function | ms | norm passes | times clipjax's time |",
        "| -: | -------- | -: | ----------: | -------------------: |",
    ]
    for size in sizes:
        fast, slow = measured(size, rounds=rounds)
        norm = statistics.median(fast["one l2 norm"])
        slow_peers = {name: slow[name] for name in slow if name not in fast}
        for name, times in (fast | slow_peers).items():
            within = fast if name in fast else slow
            middle = statistics.median(times)
            lines.append(
                f"| 10^{len(str(size)) - 1} | `{name}` | {middle:.2f} |"
                f" {middle / norm:.1f} | {timing.ratio(within, name, _OURS):.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

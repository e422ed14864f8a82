"""The k-th largest magnitude: clipjax against a sort, a top-k and NumPy."""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

import clipjax

from . import timing


def rows(sizes=(10**6, 10**7), *, rounds=9):
    """Yields one line of the table for each size and peer."""
    for size in sizes:
        x = jax.random.normal(jax.random.key(0), (size,))
        host = np.asarray(x)
        k = size // 10

        @jax.jit
        def ours(x, k):
            return clipjax.selection.kth_largest(x, k)

        mask = jax.jit(clipjax.selection.largest)
        norm = jax.jit(lambda x: jnp.sqrt(jnp.sum(jnp.square(x))))
        top = jax.jit(lambda x, k=k: jax.lax.top_k(jnp.abs(x), k)[0][-1])
        ordered = jax.jit(lambda x, k=k: jnp.sort(jnp.abs(x))[-k])
        exact = np.sort(np.abs(host))[-k]
        assert ours(x, jnp.int32(k)) == top(x) == ordered(x) == exact
        fast = timing.interleaved(
            {
                "clipjax.selection.kth_largest": functools.partial(ours, x, jnp.int32(k)),
                "clipjax.selection.largest": functools.partial(mask, x, jnp.int32(k)),
                "one l2 norm": functools.partial(norm, x),
                "numpy.partition": lambda: np.partition(np.abs(host), size - k),
            },
            rounds=2 * rounds,
        )
        slow = timing.interleaved(
            {
                "clipjax.selection.kth_largest": functools.partial(ours, x, jnp.int32(k)),
                "jax.lax.top_k": functools.partial(top, x),
                "jax.numpy.sort": functools.partial(ordered, x),
            },
            rounds=rounds,
        )
        yield size, fast, slow


def table(**options):
    """Returns the table as Markdown."""
    lines = [
        "| entries | function | ms | norm passes | times slower than clipjax |",
        "| ------: | -------- | -: | ----------: | ------------------------: |",
    ]
    ours = "clipjax.selection.kth_largest"
    for size, fast, slow in rows(**options):
        norm = statistics.median(fast["one l2 norm"])
        for times in (fast, slow):
            for name, taken in times.items():
                if times is slow and name == ours:
                    continue
                middle = statistics.median(taken)
                lines.append(
                    f"| {size:.0e} | `{name}` | {middle:.2f} | {middle / norm:.1f} |"
                    f" {timing.ratio(times, name, ours):.2f} |"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

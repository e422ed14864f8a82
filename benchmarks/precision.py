"""The norm of many bfloat16 leaves: clipjax against optax."""

import jax.numpy as jnp
import numpy as np
import optax

import clipjax


def table(leaves=10_000, entries=16):
    """Returns the relative errors as Markdown."""
    host = np.random.default_rng(0).standard_normal((leaves, entries))
    tree = list(jnp.asarray(host, jnp.bfloat16))
    exact = np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in tree))
    norms = {
        "clipjax.norms.global_norm": clipjax.norms.global_norm,
        "optax.tree.norm": optax.tree.norm,
    }
    lines = [
        f"| norm of {leaves:,} bfloat16 leaves | value | relative error |",
        "| -- | -: | -: |",
        f"| NumPy in float64 | {exact:.4f} | |",
    ]
    for name, norm in norms.items():
        value = float(norm(tree))  # compiled, optax's would take hours
        lines.append(f"| `{name}` | {value:.4f} | {abs(value / exact - 1):.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

"""The precision of a clip by the global norm: clipjax against optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipjax

_CLIPS = {"clipjax": clipjax.clip_by_global_norm, "optax": optax.clip_by_global_norm}


def norm_errors(leaves=10_000, entries=16):
    """Returns the relative error of each norm of a bfloat16 tree of many leaves."""
    host = np.random.default_rng(0).standard_normal((leaves, entries))
    tree = list(jnp.asarray(host, jnp.bfloat16))
    exact = np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in tree))
    norms = {"clipjax": clipjax.norms.global_norm, "optax": optax.tree.norm}
    # Not compiled: optax's norm of so many leaves would take XLA hours.
    return {side: abs(float(norm(tree)) / exact - 1) for side, norm in norms.items()}


def half_clipped():
    """Returns an entry of four float16 entries of 300, clipped to norm 1."""
    updates = jnp.full(4, 300, jnp.float16)
    return {
        side: float(_clipped(clip(1.0), updates)[0]) for side, clip in _CLIPS.items()
    }


def sharded_norms():
    """Returns the norm of an update clipped to 1 inside `shard_map`."""
    devices = jax.device_count()
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=auto)
    spec = jax.sharding.PartitionSpec("data")
    ours = functools.partial(clipjax.clip_by_global_norm, axis_name="data")
    result = {}
    for side, clip in (_CLIPS | {"clipjax": ours}).items():
        inside = functools.partial(_clipped, clip(1.0))
        whole = jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec)
        result[side] = float(jnp.linalg.norm(whole(jnp.ones(8 * devices))))
    return result


def _clipped(tx, updates):
    return tx.update(updates, tx.init(updates))[0]


def table():
    """Returns the table as Markdown."""
    rows = {
        "relative error of the norm of 10,000 bfloat16 leaves": norm_errors(),
        "an entry of four float16 entries of 300, clipped to norm 1": half_clipped(),
        f"norm clipped to 1 inside `shard_map`, {jax.device_count()} devices": (
            sharded_norms()
        ),
    }
    lines = ["| | clipjax | optax |", "| - | -: | -: |"]
    for name, values in rows.items():
        lines.append(f"| {name} | {values['clipjax']:.2g} | {values['optax']:.2g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(table())

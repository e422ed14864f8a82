"""The precision of a clip: clipjax against optax."""

import functools

import jax
import jax.numpy as jnp

import clipjax
from clipjax.examples import precision

_LEAVES = (1, 10, 100, 1000, 10_000)
_BOUNDS = (0.1, 0.5, 1, 2, 5, 10, 20)


def half_clipped():
    """Returns an entry of four float16 entries of 300, clipped to norm 1."""
    updates = jnp.full(4, 300, jnp.float16)
    return {
        side: float(precision.clipped(clip(1.0), updates)[0])
        for side, clip in precision.CLIPS.items()
    }


def sharded_norms():
    """Returns the norm of an update clipped to 1 inside `shard_map`."""
    devices = jax.device_count()
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=auto)
    spec = jax.sharding.PartitionSpec("data")
    ours = functools.partial(clipjax.clip_by_global_norm, axis_name="data")
    result = {}
    for side, clip in (precision.CLIPS | {"clipjax": ours}).items():
        inside = functools.partial(precision.clipped, clip(1.0))
        whole = jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec)
        result[side] = float(jnp.linalg.norm(whole(jnp.ones(8 * devices))))
    return result


def errors_by_leaves():
    """Returns the relative error of the norm, by dtype and number of leaves."""
    rows = {}
    for dtype in precision.DTYPES:
        found = precision.norm_errors(dtype, _LEAVES)
        for i, count in enumerate(_LEAVES):
            name = f"{dtype}, {count:,} {'leaves' if count > 1 else 'leaf'}"
            rows[name] = {side: errors[i] for side, errors in found.items()}
    return rows


def excesses():
    """Returns how often and how far a norm is above its bound after a clip."""
    rows = {}
    for dtype in precision.DTYPES:
        for side, found in precision.excesses(dtype).items():
            rows[f"{dtype}, {side}"] = {
                "share above the bound": f"{found['share']:.1%}",
                "largest norm - 1": f"{found['worst']:+.1e}",
            }
    return rows


def biases():
    """Returns the mean of clipped gradients, by bound."""
    return {
        name: dict(zip((f"T = {b:g}" for b in _BOUNDS), means, strict=True))
        for name, means in precision.biases(_BOUNDS).items()
    }


def table():
    """Returns the tables as Markdown."""
    errors = errors_by_leaves()
    rows = {
        "relative error of the norm of 10,000 bfloat16 leaves": (
            errors["bfloat16, 10,000 leaves"]
        ),
        "an entry of four float16 entries of 300, clipped to norm 1": half_clipped(),
        f"norm clipped to 1 inside `shard_map`, {jax.device_count()} devices": (
            sharded_norms()
        ),
    }
    shares = {str(x): precision.clipped_shares(x) for x in precision.EXTREMES}
    parts = [
        precision.table({name: _ours_first(row) for name, row in rows.items()}),
        "The relative error of the norm; leaves of 16 normal numbers:",
        precision.table({name: _ours_first(row) for name, row in errors.items()}),
        "What is left of a norm that is clipped to its half (0.5 is right):",
        precision.table({name: _ours_first(row) for name, row in shares.items()}),
        "2,000 vectors of 64 normal numbers, clipped to norm 1:",
        precision.table(excesses()),
        "The derivative of a clipped zero:",
        precision.table(
            {k: _ours_first(row) for k, row in precision.slopes_at_zero().items()}
        ),
        "The mean of 1,000 clipped gradients, one in ten 11 and the others -0.1, so"
        " that their mean is 1.01:",
        precision.table(biases(), corner="threshold"),
    ]
    return "\n\n".join(parts)


def _ours_first(row):
    return {side: row[side] for side in ("clipjax", "optax")}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(table())

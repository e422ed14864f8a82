"""Gradients that no single example can dominate: clipped one by one, then averaged.

A transform of updates sees only the mean over the batch.  This takes the place of
`jax.value_and_grad` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact, Int, PyTree

from . import norms
from ._core import checks as check, sharding, trees
from ._core.types import AxisName, Number

__all__ = [
    "ClippedGrads",
    "clipped_value_and_grad",
]


_MARGIN = 2.0**-20  # of the bound; float32 norms and products are off by some 2⁻²³


class ClippedGrads(NamedTuple):
    """What `clipped_value_and_grad` returns for a batch."""

    value: Float[Array, ""]  # mean loss, in float32 or wider
    grads: PyTree  # mean of the clipped gradients, plus the noise
    aux: PyTree  # what `fun` returned beside the loss, for each example
    norms: Float[Array, " batch"]  # of each example's gradient, before the clip
    clipped_examples: Int[Array, ""]  # how many norms were above the bound
    nonfinite_examples: Int[Array, ""]  # how many gradients were left out


def clipped_value_and_grad(
    fun: Callable[..., Any],
    max_norm: Number,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    microbatch: int | None = None,
    noise_multiplier: Number = 0.0,
    axis_name: AxisName = None,
) -> Callable[..., ClippedGrads]:
    """Clips the gradient of each example to norm c, then averages over the batch.

    g = (Σᵢ gᵢ · min(1, c / ‖gᵢ‖₂) + σ·c·z) / B, z ~ N(0, 1), for B examples

    Use it where single examples are outliers or wrong, or for differential privacy.

    Returns a function with the arguments of `fun`.  `fun` is written for one example;
    the returned function takes a batch: arguments outside of `argnums` get a leading
    axis of examples.  It also takes `key=`, which it needs if there is noise.

    No example adds more than c to the sum, in any dtype: norms, products and the sum
    are float32 or wider, and gradients are clipped to c·(1 - 2⁻²⁰), so that rounding
    cannot cross c.  A gradient of a smaller norm passes bit for bit.  Replacing an
    example moves the sum by at most 2c, removing one by at most c, apart from the
    rounding of the float32 sum.  The mean, with its noise, is rounded to the dtype of
    the parameters at the end: this may exceed c by one part in 2⁸ (bfloat16) or 2¹¹
    (float16).

    A gradient with a NaN, an infinity or a norm beyond its dtype adds zeros.  Its
    example counts in B and in `nonfinite_examples`; its loss and `aux` are returned
    unchanged.  c = ∞ clips nothing; c = 0 gives zeros, and so does a traced c that is
    negative or NaN.

    Inside `jax.shard_map`, where `jax.grad` alone would sum over the devices, each
    device gets the gradients of its own examples and, without `axis_name`, their mean.
    Every device needs the whole parameters.

    Args:
        fun: a function of the parameters and one example that returns a scalar loss, or
            `(loss, aux)`.
        max_norm: c ≥ 0, a number or a traced value.
        argnums: which arguments are differentiated; all others are batched.  Static.
        has_aux: whether `fun` returns `(loss, aux)`.  Static.
        microbatch: how many examples' gradients are in memory at once; `None` for the
            whole batch.  It need not divide the batch.  On a mesh, a multiple of the
            number of devices that the batch is split over.  Static.
        noise_multiplier: σ ≥ 0, a number or a traced value.  Only `grads` has noise:
            for differential privacy publish nothing else, and take σ from a privacy
            accountant.
        axis_name: inside `jax.shard_map`, the mesh axes over which the batch is split;
            `key` must be the same on all devices.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> def loss(w, x):
        ...     return jnp.sum(w * x)
        >>> grad = jax.jit(clipjax.per_example.clipped_value_and_grad(loss, 2.5))
        >>> batch = jnp.array([[3.0, 4.0], [0.0, 1.0], [jnp.nan, 0.0], [0.5, 0.0]])
        >>> out = grad(jnp.zeros(2), batch)
        >>> out.grads.round(4)  # [1.5, 2], [0, 1], [0, 0] and [0.5, 0]
        Array([0.5 , 0.75], dtype=float32)
        >>> out.norms, int(out.clipped_examples), int(out.nonfinite_examples)
        (Array([5. , 1. , nan, 0.5], dtype=float32), 1, 1)

    Reference:
        Martín Abadi et al., Deep Learning with Differential Privacy, 2016,
        https://arxiv.org/abs/1607.00133
    """
    check.function(fun=fun)
    check.flag(has_aux=has_aux)
    _numbers(max_norm=max_norm, noise_multiplier=noise_multiplier)
    if microbatch is not None:
        check.whole(1, microbatch=microbatch)
    fixed = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    for position in fixed:
        check.whole(0, argnums=position)
    is_noisy = not isinstance(noise_multiplier, int | float) or noise_multiplier != 0
    value_and_grad = jax.value_and_grad(fun, fixed, has_aux=has_aux)

    def clipped_grad(*args, key=None):
        if is_noisy and key is None:
            raise ValueError(
                "key must be given where noise_multiplier is not 0, but is None. Pass"
                " `key=jax.random.key(...)`, another one at each step."
            )
        batch = {i: arg for i, arg in enumerate(args) if i not in fixed}
        num_examples = _num_examples(batch)
        params = _as_varied({i: args[i] for i in fixed}, batch)
        bound = _bound(max_norm)

        def total(part):
            axes = [0 if i in part else None for i in range(len(args))]
            whole = [(params | part)[i] for i in range(len(args))]
            result, grads = jax.vmap(value_and_grad, axes)(*whole)
            values, aux = result if has_aux else (result, None)
            grad_norms = _norms(grads, values)
            sums = _clipped_sum(grads, grad_norms, bound)
            return sums, (trees.wide(values), aux, grad_norms)

        like = tuple(params[i] for i in fixed)
        start = jax.tree.map(lambda x: sharding.zeros(trees.wide, x), like)
        sums, others = _in_parts(
            total, start, batch, num_examples, microbatch or num_examples
        )
        values, aux, grad_norms = others
        finite = jnp.isfinite(grad_norms)
        above = finite & (grad_norms > bound.astype(grad_norms.dtype))
        sums, value, clipped, nonfinite = _over_devices(
            (sums, jnp.sum(values), _count(above), _count(~finite)), axis_name
        )
        if key is not None and is_noisy:
            sums = _noisy(sums, key, noise_multiplier, bound)
        examples = float(num_examples * sharding.size(axis_name))
        grads = jax.tree.map(lambda s, x: _mean(s, examples, x), sums, like)
        grads = grads[0] if isinstance(argnums, int) else grads
        return ClippedGrads(
            value / examples, grads, aux, grad_norms, clipped, nonfinite
        )

    return clipped_grad


def _clipped_sum(
    grads: PyTree, norm: Float[Array, " batch"], bound: Float[Array, ""]
) -> PyTree:
    """Sums the gradients of all examples, none with a norm above the bound."""
    bound = bound.astype(norm.dtype)
    within = bound * (1 - _MARGIN)
    above = norm > within
    divisor = jnp.where(above, norm, 1)  # never 0: a bound is 0 or more
    keep = jnp.isfinite(norm) & (bound > 0)

    def add(x):
        x = trees.wide(x)
        # First to norm 1, then to the bound: their quotient may be subnormal.
        clipped = x / _beside(divisor, x) * within.astype(x.dtype)
        axes = tuple(range(1, x.ndim))
        clipped = jnp.where(jnp.expand_dims(above, axes), clipped, x)
        kept = jnp.where(jnp.expand_dims(keep, axes), clipped, jnp.zeros_like(x))
        return jnp.sum(kept, axis=0)

    return jax.tree.map(add, grads)


def _norms(grads: PyTree, values: Inexact[Array, " batch"]) -> Float[Array, " batch"]:
    """Returns the norm of each example's gradient, right from 1e-38 to 1e38.

    Each is divided by a power of two near its largest entry, which is exact, before it
    is squared: a branch for extreme norms would need all gradients once more in memory.
    """
    leaves = [trees.wide(x) for x in jax.tree.leaves(grads) if x.size]
    if not leaves:
        return jnp.zeros_like(values, jnp.float32)
    is_double = any(jnp.finfo(x.dtype).dtype == jnp.float64 for x in leaves)
    dtype = jnp.float64 if is_double else jnp.float32

    def stacked(norm, tree):
        axes = [tuple(range(1, x.ndim)) for x in tree]
        each = [norm(x, own) for x, own in zip(tree, axes, strict=True)]
        pairs = zip(each, axes, strict=True)
        return jnp.stack([jnp.squeeze(x, own).astype(dtype) for x, own in pairs])

    unit = trees.power_of_two(jnp.max(stacked(norms.unit_inf_norm, leaves), axis=0))
    shrunk = [x * _beside(1 / unit, x) for x in leaves]
    return unit * norms.unit_norm(stacked(norms.unit_norm, shrunk), 0)[0]


def _beside(values: Float[Array, " batch"], x: Array) -> Array:
    """Returns numbers, one for each example, in the shape and dtype of gradients."""
    return jnp.expand_dims(values, tuple(range(1, x.ndim))).astype(x.dtype)


def _in_parts(
    total: Callable[[PyTree], tuple[PyTree, PyTree]],
    start: PyTree,
    batch: PyTree,
    num_examples: int,
    part: int,
) -> tuple[PyTree, PyTree]:
    """Sums over the batch part by part; keeps the order of the examples."""
    if part >= num_examples:
        return total(batch)
    steps, rest = divmod(num_examples, part)
    end = num_examples - rest
    head = jax.tree.map(lambda x: x[:end], batch) if rest else batch

    def step(sums, examples):
        more, others = total(examples)
        return jax.tree.map(jnp.add, sums, more), others

    sums, others = lax.scan(step, start, jax.tree.map(lambda x: _deal(x, steps), head))
    others = jax.tree.map(_collect, others)
    if not rest:
        return sums, others
    sums, last = step(sums, jax.tree.map(lambda x: x[end:], batch))
    return sums, jax.tree.map(lambda *x: jnp.concatenate(x), others, last)


def _deal(x: Any, steps: int) -> Array:
    """Deals examples out to the steps like cards: each device has some of each step."""
    return jnp.swapaxes(jnp.reshape(x, (-1, steps, *jnp.shape(x)[1:])), 0, 1)


def _collect(x: Array) -> Array:
    """Puts what was dealt out back in order."""
    return jnp.reshape(jnp.swapaxes(x, 0, 1), (-1, *x.shape[2:]))


def _noisy(
    sums: PyTree, key: Array, multiplier: Number, bound: Float[Array, ""]
) -> PyTree:
    """Adds N(0, (σ·c)²) to every real entry."""
    multiplier = jnp.asarray(multiplier, bound.dtype)
    # No noise is none also where nothing is clipped: 0·∞ would be NaN.
    deviation = jnp.where(multiplier > 0, multiplier * bound, 0)

    def add(x, key):
        noise = jax.random.normal(key, x.shape, x.dtype)
        # Normal complex numbers share a variance of 1 between their two parts.
        noise = noise * 2**0.5 if jnp.iscomplexobj(x) else noise
        return x + noise * deviation.astype(x.dtype)

    leaves, structure = jax.tree.flatten(sums)
    keys = jax.random.split(key, max(len(leaves), 1))
    return structure.unflatten(map(add, leaves, keys[: len(leaves)]))


def _as_varied(params: PyTree, batch: PyTree) -> PyTree:
    """Lets parameters differ from device to device as the examples do.

    The gradient of a parameter that is the same on all devices of a `jax.shard_map`
    is the sum over them: no longer that of one example.
    """
    leaves = jax.tree.leaves(batch)
    manual = [sharding.axes_of(x, sharding.manual_axes(x)) for x in leaves]
    mesh_axes = {axis for axes in manual for axis in axes}

    def vary(x):
        known = sharding.axes_of(x, tuple(mesh_axes))
        missing = tuple(sorted(mesh_axes - set(known)))
        if not missing:
            return x
        if hasattr(lax, "pcast"):
            return lax.pcast(x, missing, to="varying")
        return lax.pvary(x, missing)  # pyright: ignore  # JAX before 0.9 has this name

    return jax.tree.map(vary, params)


def _over_devices(tree: PyTree, axis_name: AxisName) -> PyTree:
    return lax.psum(tree, axis_name) if axis_name else tree


def _mean(total: Array, examples: float, param: Any) -> Inexact[Array, "..."]:
    return (total / examples).astype(jnp.result_type(param))


def _count(which: Bool[Array, " batch"]) -> Int[Array, ""]:
    return jnp.sum(which, dtype=jnp.int32)


def _bound(max_norm: Number) -> Float[Array, ""]:
    """Returns the bound in float32 or wider: 0 for one below, and for NaN."""
    bound = trees.wide(jnp.asarray(max_norm))
    return jnp.where(bound > 0, bound, 0)


def _num_examples(batch: dict[int, PyTree]) -> int:
    """Returns how many examples there are; raises unless all arguments agree."""
    lengths = {
        i: {jnp.shape(x)[0] if jnp.ndim(x) else None for x in jax.tree.leaves(arg)}
        for i, arg in batch.items()
    }
    found = set().union(*lengths.values())
    if len(found) == 1 and (length := found.pop()):
        return length
    raise ValueError(
        "All arguments but those of argnums need the same leading axis of at least one"
        f" example, but have {lengths} by position. Give what is not batched to `fun`"
        " itself, with `functools.partial`."
    )


def _numbers(**values: Any) -> None:
    for name, value in values.items():
        if callable(value):
            raise TypeError(
                f"{name} must be a number or a traced value, but is {value!r}. Call"
                " the schedule yourself, inside the compiled step."
            )
    check.not_negative(**values)


def __dir__() -> list[str]:
    return __all__

"""The fixed clips: NumPy's formula, Optax's results, and what others got wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from helpers import assert_same, normal, relaxed, x64

SHAPES = {"dense": {"kernel": (6, 4), "bias": (4,)}, "conv": {"kernel": (3, 3, 2, 5)}}
UNITS = {"dense/kernel": 0, "dense/bias": None, "conv/kernel": (0, 1, 2)}
FLOATS = ["float32", "bfloat16", "float16", "float64"]
ROUNDING = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11, "float64": 1e-6}


def shrunk(x, size, bound):
    return x * np.minimum(1, bound / np.maximum(size, 1e-300))


def clip(updates, params, bound):
    return jax.tree.map(lambda u: np.clip(u, -bound, bound), updates)


def clip_by_global_norm(updates, params, bound):
    size = np.sqrt(sum(np.sum(u**2) for u in jax.tree.leaves(updates)))
    return jax.tree.map(lambda u: shrunk(u, size, bound), updates)


def clip_by_block_rms(updates, params, bound):
    return jax.tree.map(lambda u: shrunk(u, np.sqrt(np.mean(u**2)), bound), updates)


def adaptive_grad_clip(updates, params, bound):
    def one(path, u, p):
        axes = UNITS[jax.tree_util.keystr(path, simple=True, separator="/")]
        size, scale = (np.sqrt(np.sum(x**2, axis=axes, keepdims=True)) for x in (u, p))
        return shrunk(u, size, bound * np.maximum(scale, 1e-3))

    return jax.tree_util.tree_map_with_path(one, updates, params)


CLIPS = {
    f.__name__: f
    for f in (clip, clip_by_global_norm, clip_by_block_rms, adaptive_grad_clip)
}
each_clip = pytest.mark.parametrize("name", CLIPS)
scaling = pytest.mark.parametrize("name", [name for name in CLIPS if name != "clip"])


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


@functools.cache
def make(name, bound):
    return getattr(clipjax, name)(bound)


compiled = functools.cache(jax.jit)


@functools.cache
def with_bound(name, library=clipjax):
    """The first step as a function of the bound too."""

    def update(bound, updates, params):
        tx = getattr(library, name)(bound)
        return tx.update(updates, tx.init(params), params)

    return update


def once(tx, updates, params=None):
    """The first step, compiled."""
    params = updates if params is None else params
    return compiled(tx.update)(updates, tx.init(params), params)


# What they are


@each_clip
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_clip_is_its_formula(name, dtype):
    with x64(dtype == "float64"):
        params, updates = (normal(SHAPES, seed=i, dtype=dtype) for i in (0, 1))
        update = compiled(with_bound(name))
        atol = 2**-24 if dtype == "float16" else 0  # its least positive number
        for bound in (0.03, 0.5, 1e3):
            actual, _ = update(jnp.float32(bound), updates, params)
            expected = CLIPS[name](wide(updates), wide(params), np.float32(bound))
            for one, other in zip(
                *map(jax.tree.leaves, (actual, expected)), strict=True
            ):
                one = np.float64(one)
                np.testing.assert_allclose(one, other, rtol=ROUNDING[dtype], atol=atol)


@each_clip
@pytest.mark.parametrize("dtype", FLOATS)
def test_within_the_bound_every_bit_passes(name, dtype):
    with x64(dtype == "float64"):
        params, updates = (normal(SHAPES, seed=i, dtype=dtype) for i in (0, 1))
        for bound in (1e3, jnp.inf):
            update = compiled(with_bound(name))
            actual, state = update(jnp.float32(bound), updates, params)
            assert_same(actual, updates, rtol=0)
            if name != "clip":
                assert state.clip.clipped_steps == 0


@each_clip
def test_a_bound_of_zero_gives_zeros(name):
    updates = normal(SHAPES) | {"zero": jnp.zeros(3)}
    actual, _ = once(make(name, 0.0), updates)
    assert_same(actual, jax.tree.map(jnp.zeros_like, updates), rtol=0)


@scaling
def test_a_norm_just_at_the_bound_passes(name):
    """3, 4 has norm 5 and, as one entry, an RMS of 5."""
    updates = {"w": jnp.array([5.0])} if "rms" in name else {"w": jnp.array([3.0, 4.0])}
    bound = 1.0 if name == "adaptive_grad_clip" else 5.0
    actual, state = once(make(name, bound), updates)
    assert_same(actual, updates, rtol=0)
    assert state.clip.clipped_steps == 0


@each_clip
def test_in_float32_they_are_those_of_optax(name):
    params, updates = (normal(SHAPES, seed=i) for i in (0, 1))
    ours, theirs = (compiled(with_bound(name, library)) for library in (clipjax, optax))
    for bound in (0.01, 0.3, 1.0, 100.0):
        bound = jnp.float32(bound)
        assert_same(ours(bound, updates, params)[0], theirs(bound, updates, params)[0])


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1), -1])
@pytest.mark.parametrize("eps", [1e-3, 2.0])
def test_adaptive_gradient_clipping_takes_the_arguments_of_optax(axis, eps):
    shape = {"kernel": (6, 4)}
    params, updates = (normal(shape, seed=i) for i in (0, 1))
    expected, _ = once(optax.adaptive_grad_clip(0.1, eps, axis), updates, params)
    actual, _ = once(clipjax.adaptive_grad_clip(0.1, eps, axis), updates, params)
    assert_same(actual, expected)


def test_axes_may_depend_on_the_path():
    shapes = {"a": {"kernel": (6, 4)}, "b": {"kernel": (6, 4)}}
    params, updates = (normal(shapes, seed=i) for i in (0, 1))

    def axis(path, leaf):
        assert leaf.shape == (6, 4)
        return (1,) if path == "b/kernel" else None

    actual, _ = once(clipjax.adaptive_grad_clip(0.1, axis=axis), updates, params)
    for name, axes in [("a", 0), ("b", 1)]:
        alone = clipjax.adaptive_grad_clip(0.1, axis=axes)
        assert_same(actual[name], once(alone, updates[name], params[name])[0])


def test_a_hand_computed_step_of_each():
    updates = {"w": jnp.array([[3.0, 0.0], [4.0, 1.0]])}
    params = {"w": jnp.array([[6.0, 0.0], [8.0, 0.0]])}
    steps = {
        clipjax.clip(2.0): [[2, 0], [2, 1]],
        clipjax.clip_by_global_norm(26**0.5 / 2): [[1.5, 0], [2, 0.5]],
        clipjax.clip_by_block_rms(26**0.5 / 4): [[1.5, 0], [2, 0.5]],
        clipjax.adaptive_grad_clip(0.1): [[0.6, 0], [0.8, 1e-4]],
    }
    for tx, expected in steps.items():
        assert_same(once(tx, updates, params)[0], {"w": jnp.array(expected, float)})


# Right in every precision


def test_four_float16_entries_of_300_do_not_vanish():
    """Their squares overflow: Optax gives zeros."""
    updates = {"w": jnp.full(4, 300, jnp.float16)}
    for tx, left in [
        (clipjax.clip_by_global_norm(6.0), 3),
        (clipjax.clip_by_block_rms(6.0), 6),
        (clipjax.adaptive_grad_clip(0.5), 150),
    ]:
        assert_same(once(tx, updates)[0], {"w": jnp.full(4, left, jnp.float16)})


def test_many_bfloat16_leaves_are_clipped_to_the_bound():
    """Optax finds 16 instead of 17.3: a sum of ones stands still at 256."""
    tx, updates = clipjax.clip_by_global_norm(1.0), [jnp.bfloat16(1.0)] * 300
    clipped, state = tx.update(updates, tx.init(updates))
    np.testing.assert_allclose(state.clip.norm, np.sqrt(300), rtol=1e-6)
    size = np.sqrt(sum(float(leaf) ** 2 for leaf in clipped))
    np.testing.assert_allclose(size, 1, rtol=2**-8)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("clip_by_global_norm", 1e-30),
        ("clip_by_global_norm", 1e36),
        ("clip_by_block_rms", 1e36),
    ],
)
def test_entries_whose_squares_leave_float32(name, size):
    updates = normal(SHAPES)
    expected, _ = once(make(name, 0.1), updates)
    extreme = jax.tree.map(lambda x: x * jnp.float32(size), updates)
    actual, state = once(make(name, 0.1 * size), extreme)
    actual = jax.tree.map(lambda x: x / jnp.float32(size), actual)
    assert_same(actual, expected, rtol=2e-6)
    np.testing.assert_allclose(state.clip.threshold, 0.1 * size, rtol=1e-6)
    assert state.clip.nonfinite_steps == 0


@pytest.mark.parametrize(
    ("dtype", "excess"), [("bfloat16", 2**-9), ("float16", 2**-12)]
)
def test_rounding_exceeds_the_bound_by_no_more_than_documented(dtype, excess):
    tx = clipjax.clip_by_global_norm(1.0)
    step = jax.jit(tx.update)
    state = tx.init(None)
    for seed in range(50):
        updates = normal((30,), seed=seed, dtype=dtype)
        clipped, _ = step(updates, state)
        assert np.linalg.norm(np.float64(clipped)) <= 1 + excess


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bound", [0.1, 0.3, 1.1])
def test_no_entry_exceeds_the_bound_in_any_dtype(bound, dtype):
    """0.1 rounds up in bfloat16."""
    clipped, _ = once(clipjax.clip(bound), normal((50,), dtype=dtype))
    assert np.abs(np.float64(clipped)).max() <= np.float32(bound)


@each_clip
def test_a_float32_bound_keeps_narrow_updates_narrow(name):
    """Optax raises, or silently answers in float32."""
    updates = normal(SHAPES, dtype="bfloat16")
    actual, _ = once(getattr(clipjax, name)(jnp.float32(0.1)), updates)
    expected, _ = once(make(name, 0.1), updates)
    assert_same(actual, expected, rtol=0)


@each_clip
def test_narrow_updates_of_wide_parameters_stay_narrow(name):
    params, updates = normal(SHAPES), normal(SHAPES, seed=1, dtype="bfloat16")
    actual, _ = once(make(name, 0.1), updates, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {jnp.bfloat16.dtype}


@each_clip
def test_complex_entries_are_clipped_by_magnitude(name):
    z = jax.lax.complex(jnp.array([3.0]), jnp.array([4.0]))
    bound = 0.2 if name == "adaptive_grad_clip" else 1.0
    actual, _ = once(make(name, bound), {"z": z})
    expected = jax.lax.complex(jnp.array([0.6]), jnp.array([0.8]))
    assert_same(actual, {"z": expected})


# What others got wrong


@scaling
def test_the_gradient_through_a_zero_update_is_not_nan(name):
    """Optax's is, through the square root or 0/0."""
    tx = make(name, 1.0)

    def total(x, p):
        updates, params = {"w": x}, {"w": p}
        return jnp.sum(tx.update(updates, tx.init(params), params)[0]["w"])

    slopes = jax.jit(jax.grad(total, argnums=(0, 1)))
    for x, p in [(0.0, 1.0), (0.0, 0.0), (1.0, 0.0)]:
        slope = slopes(jnp.full(3, x), jnp.full(3, p))
        assert all(np.isfinite(part).all() for part in slope)


@scaling
def test_small_updates_are_never_scaled_up(name):
    """A missing minimum with 1 amplifies what is below the bound."""
    updates = jax.tree.map(lambda x: x * 1e-3, normal(SHAPES))
    assert_same(once(make(name, 1.0), updates)[0], updates, rtol=0)


def test_block_rms_reduces_the_large_and_leaves_the_small():
    """One port divides by min(rms / d, 1): inverted."""
    updates = {"large": jnp.full(3, 8.0), "small": jnp.full(3, 0.5)}
    clipped, _ = once(clipjax.clip_by_block_rms(2.0), updates)
    assert_same(clipped, {"large": jnp.full(3, 2.0), "small": jnp.full(3, 0.5)})


def test_weights_that_start_at_zero_can_move():
    """Without ε their factor is 0 for ever."""
    updates = {"kernel": jnp.ones((4, 2))}
    params = {"kernel": jnp.zeros((4, 2))}
    clipped, _ = once(make("adaptive_grad_clip", 0.1), updates, params)
    assert_same(clipped, {"kernel": jnp.full((4, 2), 0.1 * 1e-3 / 2)})


def test_a_parameter_without_gradient_is_left_out():
    """Optax raises."""
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    updates = {"a": jnp.ones((2, 2)), "b": None}
    clipped, _ = once(make("adaptive_grad_clip", 0.1), updates, params)
    assert_same(clipped, {"a": jnp.full((2, 2), 0.1), "b": None})


@pytest.mark.parametrize("shape", [(3, 64, 32), (5, 7, 11)])
def test_a_one_dimensional_convolution_has_a_unit_an_output(shape):
    """By rank alone it would have one an input and output."""
    params, updates = ({"kernel": normal(shape, seed=i)} for i in (0, 1))
    params["bias"] = updates["bias"] = jnp.zeros(shape[-1])
    clipped, _ = once(make("adaptive_grad_clip", 0.1), updates, params)
    after, scale = (
        np.linalg.norm(np.float64(tree["kernel"]).reshape(-1, shape[-1]), axis=0)
        for tree in (clipped, params)
    )
    np.testing.assert_allclose(after, 0.1 * scale, rtol=1e-5)


@scaling
def test_clipping_twice_is_clipping_once(name):
    tx, updates = make(name, 0.3), normal(SHAPES, seed=3)
    params = normal(SHAPES)
    clipped, _ = once(tx, updates, params)
    again, _ = once(tx, clipped, params)
    assert_same(again, clipped, rtol=3e-7)


# Bad steps


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_a_bad_entry_does(bad):
    params = normal(SHAPES)
    updates = normal(SHAPES, seed=1)
    kernel = updates["dense"]["kernel"].at[2, 1].set(bad)
    updates["dense"]["kernel"] = kernel
    same = functools.partial(assert_same, rtol=0, equal_nan=True)
    close = functools.partial(assert_same, equal_nan=True)  # another program

    bounded, _ = once(make("clip", 0.1), updates)
    value = bounded["dense"]["kernel"][2, 1]
    same(value, jnp.float32(np.clip(bad, -0.1, 0.1)))

    whole, state = once(make("clip_by_global_norm", 0.1), updates)
    same(whole, updates)
    assert (state.clip.nonfinite_steps, state.clip.clipped_steps) == (1, 0)

    leaves, state = once(make("clip_by_block_rms", 0.1), updates)
    same(leaves["dense"]["kernel"], kernel)
    clean = once(make("clip_by_block_rms", 0.1), normal(SHAPES, seed=1))[0]
    close(leaves["dense"]["bias"], clean["dense"]["bias"])
    close(leaves["conv"], clean["conv"])
    assert state.clip.nonfinite_steps == 1

    units, state = once(make("adaptive_grad_clip", 0.1), updates, params)
    clean = once(make("adaptive_grad_clip", 0.1), normal(SHAPES, seed=1), params)[0]
    same(units["dense"]["kernel"][:, 1], kernel[:, 1])
    others = jnp.array([0, 2, 3])
    close(units["dense"]["kernel"][:, others], clean["dense"]["kernel"][:, others])
    close(units["conv"], clean["conv"])
    assert state.clip.nonfinite_steps == 1


def test_apply_if_finite_sees_what_a_clip_lets_pass():
    """An infinity must not come out as a zero that nobody notices."""
    tx = optax.apply_if_finite(clipjax.clip_by_global_norm(1.0), 5)
    params = {"w": jnp.ones(3)}
    bad = {"w": jnp.array([1.0, jnp.inf, 1.0])}
    with relaxed():
        updates, state = tx.update(bad, tx.init(params), params)
    assert state.total_notfinite == 1
    assert_same(updates, {"w": jnp.zeros(3)}, rtol=0)
    passed, _ = once(clipjax.clip_by_global_norm(1.0), bad)
    assert_same(passed, bad, rtol=0)


# What they remember


@scaling
def test_the_state_tells_what_was_done(name):
    params, updates = normal(SHAPES), normal(SHAPES, seed=1)
    tx = make(name, 0.1)
    clipped, state = once(tx, updates, params)
    for field, tree in [(state.clip.norm, updates), (state.clip.clipped_norm, clipped)]:
        size = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(wide(tree))))
        np.testing.assert_allclose(field, size, rtol=1e-6)
    assert state.clip.threshold == np.float32(0.1)
    assert (state.clip.step, state.clip.clipped_steps, state.clip.nonfinite_steps) == (
        1,
        1,
        0,
    )


@scaling
def test_steps_are_counted_by_what_happened_to_them(name):
    tx, params = make(name, 1.0), {"w": jnp.ones(4)}
    step, state = jax.jit(tx.update), tx.init(params)
    for size in [0.1, 9.0, np.nan, 0.1, 9.0, np.inf, 9.0]:
        _, state = step({"w": jnp.full(4, size)}, state, params)
    assert (state.clip.step, state.clip.clipped_steps, state.clip.nonfinite_steps) == (
        7,
        3,
        2,
    )
    np.testing.assert_allclose(state.clip.norm, 18)  # of the last finite step


def test_the_step_stays_at_the_last_int32():
    tx = clipjax.clip(1.0)
    last = jnp.iinfo(jnp.int32).max
    state = tx.init(None)
    state = state._replace(clip=state.clip._replace(step=jnp.int32(last)))
    assert tx.update({"w": jnp.ones(2)}, state)[1].clip.step == last


def test_a_schedule_is_read_at_each_step():
    tx = clipjax.clip(lambda step: step.astype(jnp.float32))
    state, seen = tx.init(None), []
    for _ in range(3):
        clipped, state = tx.update(jnp.float32(9), state)
        seen.append(float(clipped))
    assert seen == [0, 1, 2]

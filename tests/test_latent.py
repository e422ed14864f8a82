"""Latent: dense weights in the state, exactly sparse ones in the network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import P

import clipjax
from clipjax import allocations, latents, latents as rules, masks, patterns, scores
from helpers import assert_same, normal, relaxed, x64

SHAPES = {"a": {"kernel": (9, 11), "bias": (11,)}, "b": {"kernel": (11, 5)}}
SMALL = {"a": SHAPES["a"]}  # compiles in half the time
SIZES = {"a/kernel": 99, "b/kernel": 55}
STEPS = 12


def slopes(params, target, step):
    """Gradients of a bowl that turns steeper; entry by entry, in any dtype."""
    return jax.tree.map(
        lambda p, t: (p - t) * (1 + jnp.asarray(step, p.dtype) / 4), params, target
    )


def train(tx, params, target, *, steps=STEPS, dtype=None):
    """The parameters after each step, and the last state."""

    def step(carry, index):
        params, state = carry
        grads = slopes(params, target, index)
        if dtype is not None:
            grads = jax.tree.map(lambda g: g.astype(dtype), grads)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    def run(params):
        state = tx.init(params)
        params = latents.sparse_params(state, params)
        indices = jnp.arange(steps, dtype=jnp.int32)
        (_, state), history = jax.lax.scan(step, (params, state), indices)
        return history, state

    with relaxed():
        return jax.jit(run)(params)


def kernels(tree):
    return {f"{name}/kernel": layer["kernel"] for name, layer in tree.items()}


def kept(size, sparsity):
    """n - ⌈s·n⌉, but one at least."""
    return max(size - int(np.ceil(round(sparsity * 1e7) / 1e7 * size - 1e-9)), 1)


# Every method against its formula, in float64


def top(score, count):
    mask = np.zeros(score.size, bool)
    mask[np.argsort(-score, axis=None, kind="stable")[:count]] = True
    return mask.reshape(score.shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Plain:
    """Straight-through, as all others where they do not say otherwise."""

    backward = None

    def start(self, weights):
        self.level = np.float64(0)
        return weights

    def weights(self, z):
        return z

    def kept(self, z, share, old):
        del old
        return top(np.abs(self.weights(z)), kept(z.size, share))

    def gradient(self, g, z, kept, explored):
        del kept, explored
        return g * np.ones_like(z), np.float64(0)


class SrSte(Plain):
    def gradient(self, g, z, kept, explored):
        return g + 0.03 * ~kept * z, 0.0


class TopKast(Plain):
    backward = 0.25

    def gradient(self, g, z, kept, explored):
        density = kept.mean()
        return explored * (g + 0.03 * z * (kept + ~kept / density)), 0.0


class Surgery(Plain):
    def kept(self, z, share, old):
        return top(np.abs(z) * np.where(old, 1.2 / 0.8, 1), kept(z.size, share))


class Deviations(Plain):
    def start(self, weights):
        size = np.abs(weights)
        self.threshold = size.mean() + 0.4 * size.std()
        return super().start(weights)

    def kept(self, z, share, old):
        low, high = 0.9 * self.threshold, 1.1 * self.threshold
        return np.where(np.abs(z) <= low, False, np.where(np.abs(z) > high, True, old))


class Soft(Plain):
    def start(self, weights):
        self.level = np.float64(-2)
        return weights + np.sign(weights) * sigmoid(self.level)

    def weights(self, z):
        return np.sign(z) * np.maximum(np.abs(z) - sigmoid(self.level), 0)

    def kept(self, z, share, old):
        return np.ones_like(z, bool)

    def gradient(self, g, z, kept, explored):
        g = g * (self.weights(z) != 0)
        slope = sigmoid(self.level) * (1 - sigmoid(self.level))
        return g, -slope * (g * np.sign(z)).sum()


class Power(Plain):
    def start(self, weights):
        super().start(weights)
        return np.sign(weights) * np.abs(weights) ** (1 / 1.5)

    def weights(self, z):
        return z * np.abs(z) ** 0.5

    def gradient(self, g, z, kept, explored):
        return g * 1.5 * np.abs(z) ** 0.5, 0.0


METHODS = {
    "straight_through": (rules.straight_through(), Plain),
    "sr_ste": (rules.sr_ste(0.03), SrSte),
    "top_kast": (rules.top_kast(0.25, 0.03), TopKast),
    "surgery": (rules.surgery(0.2), Surgery),
    "deviations": (rules.surgery(deviations=0.4), Deviations),
    "soft_threshold": (rules.soft_threshold(-2.0), Soft),
    "power_propagation": (rules.power_propagation(1.5), Power),
}
BY_ITSELF = ("deviations", "soft_threshold")  # no sparsity is asked for


class Sgd:
    def __call__(self, g, t):
        return -0.1 * g


class Adam:
    m = v = 0.0

    def __call__(self, g, t):
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g**2
        m, v = self.m / (1 - 0.9 ** (t + 1)), self.v / (1 - 0.999 ** (t + 1))
        return -0.05 * m / (np.sqrt(v) + 1e-8)


OPTIMIZERS = {"sgd": (optax.sgd(0.1), Sgd), "adam": (optax.adam(0.05), Adam)}


def share_at(step):
    return 0.35 + 0.03 * step


def naive(method, optimizer, weights, target):
    """All parameters after each step, and the last latent weights, of one kernel."""
    step_z, step_level = optimizer(), optimizer()
    z = method.start(weights)
    everything = np.ones_like(z, bool)
    mask, history = method.kept(z, share_at(0), everything), []
    for t in range(STEPS):
        explored = everything
        if method.backward is not None:
            size = np.abs(method.weights(z))
            explored = mask | top(size, kept(z.size, min(method.backward, share_at(t))))
        theta = np.where(mask, method.weights(z), 0)
        g = (theta - target) * (1 + t / 4)
        g, level_g = method.gradient(g, z, mask, explored)
        z = z + step_z(g, t)
        method.level = method.level + step_level(level_g, t)
        mask = method.kept(z, share_at(t), mask)
        history.append(np.where(mask, method.weights(z), 0))
    return history, z


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [(name, "sgd") for name in METHODS]
    + [(name, "adam") for name in ("sr_ste", "top_kast", "soft_threshold")],
)
def test_every_method_follows_its_formula(name, optimizer):
    rule, method = METHODS[name]
    ours, theirs = OPTIMIZERS[optimizer]
    params, target = normal(SMALL), normal(SMALL, seed=1)
    sparsity = None if name in BY_ITSELF else lambda t: 0.35 + 0.03 * t
    tx = clipjax.latent(ours, sparsity, reparametrization=rule)
    history, state = train(tx, params, target)
    weights, goal = (np.float64(tree["a"]["kernel"]) for tree in (params, target))
    expected, z = naive(method(), theirs, weights, goal)
    for actual, theta in zip(np.asarray(history["a"]["kernel"]), expected, strict=True):
        np.testing.assert_array_equal(actual == 0, theta == 0)
        np.testing.assert_allclose(actual, theta, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(state.latents["a/kernel"], z, rtol=2e-4, atol=2e-5)
    zeros = [float((theta == 0).mean()) for theta in expected]
    assert 0.02 < zeros[-1] < 0.9
    assert len({tuple((theta == 0).flat) for theta in expected}) > 3  # masks moved


def test_straight_through_is_that_of_a_loop_bit_for_bit():
    """Dense weights that the user keeps, masked before every forward pass."""
    params, target, adam = normal(SMALL), normal(SMALL, seed=1), optax.adam(0.01)

    def masked(params):
        kernel = params["a"]["kernel"]
        marked = patterns.Unstructured().masks(
            {"kernel": jnp.abs(kernel)}, 0.6, allocation=allocations.uniform
        )
        kernel = jnp.where(marked["kernel"], kernel, 0)
        return {"a": params["a"] | {"kernel": kernel}}

    def step(carry, index):
        dense, state = carry
        updates, state = adam.update(slopes(masked(dense), target, index), state, dense)
        dense = optax.apply_updates(dense, updates)
        return (dense, state), masked(dense)

    with relaxed():
        indices = jnp.arange(50, dtype=jnp.int32)
        run = jax.jit(lambda *start: jax.lax.scan(step, start, indices))
        (dense, _), expected = run(params, adam.init(params))
        history, state = train(clipjax.latent(adam, 0.6), params, target, steps=50)
    assert_same(state.latents["a/kernel"], dense["a"]["kernel"], rtol=0)
    assert_same(history, expected, rtol=0)
    masks = np.asarray(history["a"]["kernel"] != 0).reshape(50, -1)
    assert (masks.any(0) & ~masks.all(0)).sum() > 5


# Exact zeros, exact numbers


@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype"),
    [
        ("float32", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "float16"),
        ("float64", "float32"),
    ],
)
def test_zeros_are_exact_and_so_is_their_number(param_dtype, grad_dtype):
    with x64(param_dtype == "float64"):
        params = normal(SMALL, dtype=param_dtype)
        target = normal(SMALL, seed=1, dtype=param_dtype)
        tx = clipjax.latent(optax.sgd(0.3), 0.7)
        history, state = train(tx, params, target, steps=4, dtype=grad_dtype)
        for after in np.asarray(history["a"]["kernel"].astype(jnp.float32)):
            assert (after == 0).sum() == 99 - kept(99, 0.7)
            assert not np.signbit(after[after == 0]).any()
        wide = "float64" if param_dtype == "float64" else "float32"
        latent = state.latents["a/kernel"]
        assert latent.dtype == wide
        last = history["a"]["kernel"][-1]
        expected = jnp.where(last != 0, latent, 0).astype(param_dtype)
        assert_same(last, expected, rtol=0)  # φ of the latent weights, rounded once
        assert (history["a"]["bias"] != 0).all()


def test_the_sparsity_follows_its_schedule_over_all_layers():
    tx = clipjax.latent(
        optax.sgd(0.3),
        optax.polynomial_schedule(0.1, 0.9, 3, 8),
        reparametrization=rules.surgery(0.1),
        allocation=allocations.global_,
        every=2,
    )
    history, state = train(tx, normal(SHAPES), normal(SHAPES, seed=1))
    for step in range(STEPS):
        zeros = sum(int((x[step] == 0).sum()) for x in kernels(history).values())
        due = step - step % 2 if step < 7 else 8  # where the ramp ends
        share = 0.9 - 0.8 * (1 - due / 8) ** 3
        assert zeros == 154 - kept(154, share)
    masks = state.latent_masks
    assert masks.step == STEPS
    np.testing.assert_allclose(masks.total_sparsity, 139 / 154, rtol=1e-6)
    assert clipjax.metrics(state)["sparsity"] == masks.total_sparsity


def test_hysteresis_keeps_masks_from_moving_to_and_fro():
    def changes(hysteresis):
        tx = clipjax.latent(
            optax.sgd(0.5), 0.6, reparametrization=rules.surgery(hysteresis)
        )
        history, _ = train(tx, normal(SMALL), normal(SMALL, seed=1), steps=20)
        masks = np.asarray(history["a"]["kernel"]) != 0
        return (masks[1:] != masks[:-1]).sum()

    assert changes(0.5) < 0.6 * changes(0.0)


@pytest.mark.parametrize(
    "pattern", [patterns.NofM(2, 4, axis=0), patterns.Channels(axis=1)]
)
def test_any_pattern_will_do(pattern):
    params, target = ({"kernel": normal((8, 6), seed=i)} for i in range(2))
    tx = clipjax.latent(
        optax.adam(0.05), 0.5, reparametrization=rules.sr_ste(), pattern=pattern
    )
    history, state = train(tx, params, target, steps=6)
    mark = functools.partial(pattern.masks, allocation=allocations.uniform)
    sizes = {"kernel": jnp.abs(state.latents["kernel"])}
    expected = jax.jit(lambda scores: mark(scores, 0.5))(sizes)
    np.testing.assert_array_equal(history["kernel"][-1] != 0, expected["kernel"])
    assert (history["kernel"] == 0).sum(axis=(1, 2)).tolist() == [24] * 6


# Scores


@pytest.mark.parametrize("score", [scores.saliency, scores.Movement(gradients=True)])
def test_a_score_sees_dense_weights_and_raw_gradients(score):
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    grads = {"kernel": jnp.array([[-9.0, 0.5, -2.0, 1.0]])}
    tx = clipjax.latent(optax.sgd(0.0), 0.5, score=score, every=3)
    state = tx.init(params)
    start = latents.sparse_params(state, params)
    assert_same(start["kernel"], jnp.array([[0.0, 0.0, 3.0, 4.0]]))  # by magnitude
    update = jax.jit(tx.update)
    updates, state = update(grads, state, start)
    after = optax.apply_updates(start, updates)
    assert_same(after["kernel"], jnp.array([[1.0, 0.0, 3.0, 0.0]]))  # 9 and 6
    _, state = update(grads, state, after)
    assert state.latent_masks.mask_age == 2


# The optimizer inside


def test_weight_decay_and_extra_arguments_reach_the_inner_optimizer():
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda p: -value * p, params), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = clipjax.latent(inner, 0.5)
    params = {"kernel": jnp.array([[4.0, 1.0]]), "bias": jnp.array([2.0])}
    state = tx.init(params)
    params = latents.sparse_params(state, params)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(grads, state, params, value=0.5)
    after = optax.apply_updates(params, updates)
    assert_same(after, {"kernel": jnp.array([[2.0, 0.0]]), "bias": jnp.array([1.0])})
    assert_same(latents.latent_params(state, after)["kernel"], jnp.array([[2.0, 0.5]]))


def test_a_learned_level_is_stepped_and_clipped_with_the_weights():
    inner = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0))
    tx = clipjax.latent(inner, None, reparametrization=rules.soft_threshold(0.0))
    params = {"kernel": jnp.array([[4.0, -1.0]])}
    state = tx.init(params)
    assert_same(state.latents["kernel"], jnp.array([[4.5, -1.5]]))
    with relaxed():
        _, after = tx.update({"kernel": jnp.array([[2.0, 3.0]])}, state, params)
    scale = 0.5 / np.sqrt(4 + 9 + 0.25**2)  # ∂ℓ = -σ′(0)·(2 - 3)
    np.testing.assert_allclose(after.levels["kernel"], -0.25 * scale, rtol=1e-5)
    moved = after.latents["kernel"] - state.latents["kernel"]
    np.testing.assert_allclose(moved, [[-2 * scale, -3 * scale]], rtol=1e-5)


def test_a_bad_step_is_none_at_all():
    """For all leaves, wherever the NaN is, and for learned levels too."""
    rule = dataclasses.replace(rules.soft_threshold(-1.0), backward_sparsity=0.3)
    tx = clipjax.latent(optax.adam(0.1), 0.4, reparametrization=rule, every=2)
    params, grads = normal(SMALL), normal(SMALL, seed=1)
    update = jax.jit(tx.update)
    with relaxed():
        state = tx.init(params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for bad in (np.nan, np.inf):
            broken = {"a": grads["a"] | {"bias": grads["a"]["bias"].at[0].set(bad)}}
            updates, after = update(broken, state, params)
            assert_same(after, state, rtol=0)
            assert_same(optax.apply_updates(params, updates), params)


def test_a_latent_weight_stays_where_its_next_value_is_not_finite():
    tx = clipjax.latent(optax.scale(-1e30), 0.5)
    params = {"kernel": jnp.array([[4.0, 1.0]])}
    grads = {"kernel": jnp.array([[1e20, 1e-30]])}
    _, state = tx.update(grads, tx.init(params), params)
    assert_same(state.latents["kernel"], jnp.array([[4.0, 0.0]]))


# Around it


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.identity(), tx),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 2),
    ],
    ids=["chain", "apply_if_finite", "MultiSteps"],
)
def test_wrapped_it_is_as_sparse(wrap):
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05))
    tx = wrap(clipjax.latent(inner, 0.6))
    history, state = train(tx, normal(SMALL), normal(SMALL, seed=1), steps=6)
    for after in np.asarray(history["a"]["kernel"]):
        assert (after == 0).sum() == 99 - kept(99, 0.6)
    assert not np.array_equal(history["a"]["kernel"][1], history["a"]["kernel"][5])
    assert optax.tree.get(state, "mask_age") == 1


def test_it_trains_in_nnx_from_sparse_weights_on():
    model = nnx.Linear(9, 11, rngs=nnx.Rngs(0))
    tx = optax.chain(clipjax.latent(optax.adam(0.01), 0.6))
    with relaxed():
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        params = nnx.state(model, nnx.Param)
        dense = np.asarray(model.kernel[...])
        nnx.update(model, latents.sparse_params(optimizer.opt_state, params))
        zeros = 99 - kept(99, 0.6)
        assert (model.kernel[...] == 0).sum() == zeros

        @nnx.jit
        def step(model, optimizer):
            grads = nnx.grad(lambda m: jnp.sum(jnp.square(m(jnp.ones((2, 9))) - 1)))(
                model
            )
            optimizer.update(model, grads)

        for _ in range(3):
            step(model, optimizer)
            assert (model.kernel[...] == 0).sum() == zeros
        params = nnx.state(model, nnx.Param)
        latent = nnx.to_pure_dict(latents.latent_params(optimizer.opt_state, params))
    assert (latent["kernel"] != 0).all()
    np.testing.assert_allclose(latent["kernel"], dense, atol=0.05)


def test_helpers_say_where_there_is_no_latent():
    params = {"kernel": jnp.ones((2, 2))}
    state = optax.adam(1e-3).init(params)
    for helper in (latents.sparse_params, latents.latent_params):
        with pytest.raises(ValueError, match=r"^opt_state holds no state of `latent`"):
            helper(state, params)


@pytest.mark.parametrize(
    ("sparsity", "rule", "message"),
    [
        (None, rules.straight_through(), "^sparsity is None.*Pass a number"),
        (None, rules.power_propagation(), "^sparsity is None.*Pass a number"),
        (0.5, rules.surgery(deviations=1.0), "^sparsity must be None where"),
        (1.5, rules.straight_through(), "^sparsity must lie between 0 and 1"),
    ],
)
def test_a_sparsity_is_given_where_it_counts(sparsity, rule, message):
    with pytest.raises(ValueError, match=message):
        clipjax.latent(optax.sgd(0.1), sparsity, reparametrization=rule)


def test_the_state_is_a_copy_in_float32_and_a_bit_or_two_a_parameter():
    params = {"kernel": normal((64, 256), dtype="bfloat16")}
    for rule, bits in [(rules.sr_ste(), 1), (rules.top_kast(0.5), 2)]:
        state = clipjax.latent(optax.sgd(0.1), 0.9, reparametrization=rule).init(params)
        stored = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        assert 0 <= stored - 64 * 256 * (4 + bits / 8) <= 64


def test_booleans_hold_the_same_masks():
    params, rule = normal({"a": {"kernel": (9, 11)}}), rules.top_kast(0.25)
    target = jax.tree.map(jnp.zeros_like, params)
    results = []
    for storage in (masks.Bits(), masks.Booleans()):
        tx = clipjax.latent(
            optax.sgd(0.5), 0.5, reparametrization=rule, storage=storage
        )
        results.append(train(tx, params, target))
    (bits, _), (booleans, state) = results
    assert_same(booleans, bits, rtol=0)
    assert state.latent_masks.mask_bits["a/kernel"].dtype == bool
    assert state.explored_bits["a/kernel"].dtype == bool
    with pytest.raises(ValueError, match="latent keeps entries that may be zero"):
        clipjax.latent(optax.sgd(0.5), 0.5, storage=masks.Zeros())


# Eight devices

SPLIT = {"rows": {"kernel": (16, 24)}, "columns": {"kernel": (8, 64)}}
SPECS = {"rows": {"kernel": P("d")}, "columns": {"kernel": P(None, "d")}}


def mesh_of(kind):
    axis_type = getattr(jax.sharding.AxisType, kind)
    return jax.make_mesh((8,), ("d",), axis_types=(axis_type,))


def two_steps(name, axis_name=None):
    """A function of parameters and target to all that two steps change."""
    by_itself = name in BY_ITSELF
    options = {} if by_itself else {"allocation": allocations.global_}
    tx = clipjax.latent(
        optax.sgd(0.3),
        None if by_itself else 0.6,
        reparametrization=METHODS[name][0],
        axis_name=axis_name,
        **options,
    )

    def run(params, target):
        def step(carry, index):
            params, state = carry
            updates, state = tx.update(slopes(params, target, index), state, params)
            return (optax.apply_updates(params, updates), state), None

        indices = jnp.arange(2, dtype=jnp.int32)
        start = (params, tx.init(params))
        (params, state), _ = jax.lax.scan(step, start, indices)
        return params, state.latents, state.levels

    return run


@functools.cache
def on_one_device(name):
    return jax.device_get(jax.jit(two_steps(name))(*split_trees()))


def split_trees():
    return normal(SPLIT), normal(SPLIT, seed=1)


@pytest.mark.parametrize("kind", ["Explicit", "Manual"])
@pytest.mark.parametrize("name", ["soft_threshold"])  # of all, see the contract
def test_a_mesh_changes_nothing_and_gathers_nothing(name, kind):
    mesh = mesh_of("Auto" if kind == "Manual" else kind)
    shardings = jax.tree.map(functools.partial(jax.NamedSharding, mesh), SPECS)
    trees = jax.device_put(split_trees(), (shardings, shardings))
    run = two_steps(name, "d" if kind == "Manual" else None)
    if kind == "Manual":
        latents = {f"{name}/kernel": layer["kernel"] for name, layer in SPECS.items()}
        out_specs = (SPECS, latents, P())
        run = jax.shard_map(
            run, mesh=mesh, in_specs=(SPECS, SPECS), out_specs=out_specs
        )
    compiled = jax.jit(run).lower(*trees).compile()
    assert "all-reduce" in compiled.as_text()
    for exchange in ("all-gather", "all-to-all", "collective-permute"):
        assert exchange not in compiled.as_text()
    actual, expected = jax.device_get(compiled(*trees)), on_one_device(name)
    assert_same(actual, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_array_equal(one == 0, other == 0)

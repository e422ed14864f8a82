"""Trees as libraries make them: modules, shapes alone, and dtypes that do not match."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn, nnx

import clipjax
from clipjax import contrib, patterns, scopes
from helpers import assert_same, relaxed, spec
from transforms import TRANSFORMS


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "bias", "activation", "name"],
    meta_fields=[],
)
@dataclasses.dataclass
class Module:
    """As in Equinox: callable, and some of its leaves are no arrays."""

    weight: Any
    bias: Any
    activation: Any = jax.nn.relu
    name: Any = "layer"

    def __call__(self, x):
        return self.activation(self.weight @ x + self.bias)


MODULE = Module(jnp.arange(12.0).reshape(3, 4) - 5.5, jnp.arange(3.0))
DTYPE = dataclasses.replace(MODULE, name=jnp.float32)  # a class that has a dtype
RATE = dataclasses.replace(MODULE, name=0.5)  # a number that is no array
ARRAYS = dataclasses.replace(MODULE, activation=None, name=None)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_leaves_that_are_no_arrays_are_left_alone(name):
    tx = TRANSFORMS[name].make()
    state = tx.init(ARRAYS)
    with relaxed():
        expected, _ = tx.update(ARRAYS, state, ARRAYS)
        for module in (MODULE, DTYPE):
            updates, after = tx.update(ARRAYS, state, module)
            assert_same(updates, expected)
            assert spec(after) == spec(state)


def test_moments_restart_beside_leaves_that_are_no_arrays():
    for tx in (
        clipjax.reset_moments(optax.adam(0.1), every=1),
        clipjax.sparse(optax.adamw(0.1), 0.5, every=1),
        contrib.rewinding(optax.adam(0.1), every=1, rounds=1),
    ):
        with relaxed():
            state = tx.init(ARRAYS)
            for module in (MODULE, RATE, MODULE):
                updates, state = tx.update(ARRAYS, state, module)
        assert updates.activation is None
        assert jnp.isfinite(updates.weight).all()


def test_a_module_is_pruned_and_may_hold_scores():
    pruned = clipjax.prune(MODULE, 0.5)
    assert pruned.activation is jax.nn.relu
    assert (pruned.weight == 0).sum() == 6
    reverse = dataclasses.replace(MODULE, weight=-jnp.abs(MODULE.weight))
    smallest = clipjax.prune(MODULE, 0.5, score=reverse)
    assert ((smallest.weight == 0) != (pruned.weight == 0)).all()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_init_takes_shapes_alone(name):
    params = {
        "kernel": jnp.full((4, 8), 2, jnp.float32),
        "bias": jnp.zeros(8, jnp.float32),
    }
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state = TRANSFORMS[name].make().init(shapes)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert spec(state) == spec(TRANSFORMS[name].make().init(params))


def test_what_an_inner_optimizer_remembers_keeps_its_dtype():
    """Plain Adam of bfloat16 parameters has float32 moments after float32 gradients."""
    params = {"kernel": jnp.ones((8, 8), jnp.bfloat16)}
    grads = {"kernel": jnp.ones((8, 8), jnp.float32)}
    adam = optax.adam(0.01)
    for tx in (
        clipjax.skip_spikes(adam),
        clipjax.reset_moments(adam, every=2),
        clipjax.latent(adam, 0.5),
        contrib.greedy_clip(adam, [1.0, 2.0]),
    ):
        with relaxed():
            state = tx.init(params)
            for _ in range(3):
                updates, after = tx.update(grads, state, params, value_fn=_first)
                assert spec(after) == spec(state)
                state = after
        assert (updates["kernel"] != 0).any()


def _first(params):
    return params["kernel"][0, 0].astype(jnp.float32)


@pytest.mark.parametrize(
    ("path", "shape", "bias", "axes"),
    [
        ("linear/weight", (3, 2), (3,), (1,)),
        ("linear/weight", (3, 3), (3,), (1,)),
        ("linear/weight", (3, 2), None, (1,)),
        ("conv/weight", (8, 4, 3, 3), (8, 1, 1), (1, 2, 3)),
        ("transposed/weight", (4, 8, 3, 3), (8,), (0, 2, 3)),
        ("embedding/weight", (50, 4), None, (1,)),
        ("lstm/weight_ih", (16, 4), None, (1,)),
        ("Dense_0/kernel", (3, 3), (3,), (0,)),
        ("ConvTranspose_0/kernel", (3, 3, 8, 4), (8,), (0, 1, 3)),
        ("linear/w", (2, 3), (3,), (0,)),
    ],
)
def test_a_unit_feeds_one_output_in_every_layout(path, shape, bias, axes):
    parent, _, _ = path.rpartition("/")
    leaves = {path: jnp.ones(shape)}
    if bias is not None:
        leaves[f"{parent}/{'b' if path.endswith('/w') else 'bias'}"] = jnp.ones(bias)
    assert scopes.Unit().part(path, leaves).axes == axes


def test_channels_of_a_weight_are_its_rows():
    weight = jnp.array([[3.0, 3.0], [0.1, 0.1], [2.0, 2.0]])
    pruned = clipjax.prune({"weight": weight}, 1 / 3, pattern=patterns.Channels())
    assert (pruned["weight"] == weight.at[1].set(0)).all()
    kernel = clipjax.prune({"kernel": weight.T}, 1 / 3, pattern=patterns.Channels())
    assert (kernel["kernel"] == weight.T.at[:, 1].set(0)).all()


def test_an_infinite_leaf_leaves_the_others_as_they_are():
    updates = {"a": jnp.array([jnp.inf, 1.0]), "b": jnp.array([3.0, 4.0])}
    for tx in (
        clipjax.normalize_by_update_norm(2.0),
        clipjax.normalize_by_update_norm(2.0, eps=1e-6),
        clipjax.clip_by_global_norm(1.0),
    ):
        changed, _ = tx.update(updates, tx.init(updates))
        assert_same(changed, updates, rtol=0)


def test_what_is_true_or_false_is_not_a_word():
    for make in (
        lambda: clipjax.clip_by(1.0, strict="no"),
        lambda: scopes.Group(lambda path, leaf: path, shared="no"),
        lambda: clipjax.thresholds.WindowedQuantile(current="no"),
        lambda: contrib.zclip(skip="no"),
        lambda: contrib.greedy_clip(optax.sgd(1.0), [1.0], relative="no"),
        lambda: clipjax.scores.Movement(gradients="no"),
        lambda: patterns.NofM(2, 4, dense_if_ragged="no"),
        lambda: patterns.Blocks((2, 2), dense_if_ragged="no"),
        lambda: clipjax.per_example.clipped_value_and_grad(
            lambda p, x: p, max_norm=1.0, has_aux="no"
        ),
    ):
        with pytest.raises(TypeError, match="must be True or False, but is 'no'"):
            make()
    with pytest.raises(TypeError, match="shape must be a tuple"):
        patterns.Blocks(3)  # pyright: ignore[reportArgumentType] -- the mistake


def test_no_threshold_is_reported_as_none():
    tx = clipjax.clip_by_global_norm(jnp.inf)
    updates = {"w": jnp.ones(2)}
    _, state = tx.update(updates, tx.init(updates))
    assert clipjax.metrics(state)["threshold"] == jnp.inf


def test_a_vector_beyond_the_squares_is_clipped_by_its_spectral_norm():
    bound = clipjax.Bound(1.0, scopes.Leaf(), clipjax.norms.spectral_norm)
    tx = clipjax.clip_by(bound)
    updates = {"v": jnp.array([3e30, 4e30])}
    changed, _ = tx.update(updates, tx.init(updates))
    assert_same(changed, {"v": jnp.array([0.6, 0.8])}, rtol=1e-6)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_optax_maps_over_what_is_kept_of_parameters(name):
    """By a state of a stand-in, with one leaf in place of every dict by path."""
    assert_mapped(TRANSFORMS[name].make())


@pytest.mark.parametrize(
    ("reparametrization", "sparsity"),
    [
        (clipjax.latents.top_kast(0.25), 0.5),
        (clipjax.latents.surgery(deviations=1.0), None),
        (clipjax.latents.soft_threshold(), None),
    ],
)
def test_optax_maps_over_moments_of_latent_weights(reparametrization, sparsity):
    inner = optax.chain(contrib.adagc(), optax.adam(0.1))
    tx = clipjax.latent(inner, sparsity, reparametrization=reparametrization)
    assert assert_mapped(tx) == 2


def assert_mapped(tx):
    """Returns how many trees of parameters there are."""
    params = {"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}}
    with relaxed():
        state = jax.eval_shape(tx.init, params)
        mapped = optax.tree_map_params(
            tx,
            lambda _, spec: spec,
            state,
            {"dense": {"kernel": "of the kernel", "bias": "of the bias"}},
            transform_non_params=lambda x: x,
        )
        same = optax.tree_map_params(tx, lambda x: x, state)
    assert spec(same) == spec(state)
    return jax.tree.leaves(mapped).count("of the kernel")


ADAM = optax.adam(0.1)
KEPT = {  # what is kept of a parameter, in its shape
    "latent": (clipjax.latent(ADAM, 0.5), ["latents"]),
    "top_kast": (
        clipjax.latent(
            ADAM,
            0.5,
            reparametrization=clipjax.latents.top_kast(0.25),
            storage=clipjax.masks.Booleans(),
        ),
        ["latents", "mask_bits", "explored_bits"],
    ),
    "rewinding": (
        contrib.rewinding(ADAM, every=2, rounds=1, rewind_step=1),
        ["rewound"],
    ),
    "sparsify": (
        clipjax.sparsify(
            0.5, score=clipjax.scores.Movement(), storage=clipjax.masks.Booleans()
        ),
        ["score_memory", "mask_bits"],
    ),
    "sparse_momentum": (
        contrib.sparse_momentum(ADAM, 0.5, total_steps=9, key=jax.random.key(0)),
        ["score_memory"],
    ),
    "carry_clipped": (clipjax.carry_clipped(contrib.adagc()), ["carry"]),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_of_a_parameter_lies_as_its_box_says(name):
    (tx, fields), own = KEPT[name], (None, "model")
    kernel, bias = jnp.arange(64.0).reshape(4, 16) - 31, jnp.ones(16)
    plain = {"kernel": kernel, "bias": bias}
    params = {"kernel": nn.Partitioned(kernel, own), "bias": bias}
    with relaxed():
        state = jax.eval_shape(tx.init, params)
        _, after = jax.eval_shape(tx.update, params, state, params)
        unboxed = jax.eval_shape(tx.init, plain)
    assert spec(after) == spec(state)
    assert spec(nn.unbox(state)) == spec(unboxed)
    specs = nn.get_partition_spec(state)
    for field in fields:
        assert optax.tree.get(specs, field)["kernel"] == jax.P(*own)


@pytest.mark.parametrize("name", KEPT)
def test_a_variable_keeps_its_metadata_in_the_state(name):
    tx, fields = KEPT[name]
    params = nnx.State({"kernel": nnx.Param(jnp.ones((4, 16)), mine="said")})
    with relaxed():
        state = jax.eval_shape(tx.init, params)
        _, after = jax.eval_shape(tx.update, params, state, params)
    assert spec(after) == spec(state)
    for field in fields:
        assert optax.tree.get(state, field)["kernel"].mine == "said"


@jax.tree_util.register_static
class Activation:
    """As modules hold them: a node without arrays."""


@pytest.mark.parametrize("make", [clipjax.adaptive_clip, lambda: clipjax.sparsify(0.5)])
def test_parameters_may_hold_nodes_without_arrays_and_plain_numbers(make):
    tx, params = make(), {"kernel": jnp.ones((4, 4)), "act": Activation()}
    updates, _ = tx.update(params, tx.init(params), params | {"scale": 0.5})
    assert spec(updates) == spec(params)


def test_a_group_may_hold_nothing_that_a_choice_takes():
    tx = clipjax.sparsify(0.5, where=lambda path, leaf: leaf.ndim == 2)
    split = optax.partition({"a": tx, "b": tx}, {"kernel": "a", "bias": "b"})
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    updates, _ = split.update(params, split.init(params), params)
    assert (updates["kernel"] == -1).sum() == 8


def test_boxed_parameters_train_as_others_do():
    tx = clipjax.latent(ADAM, 0.5)
    plain = {"kernel": jnp.arange(64.0).reshape(4, 16) - 31}
    params = {"kernel": nn.Partitioned(plain["kernel"], (None, "model"))}
    with relaxed():
        state, other = tx.init(params), tx.init(plain)
        for _ in range(2):
            updates, state = tx.update(params, state, params)
            expected, other = tx.update(plain, other, plain)
    assert_same(nn.unbox(updates), expected, rtol=0)
    assert_same(
        clipjax.latents.latent_params(state, plain)["kernel"], other.latents["kernel"]
    )

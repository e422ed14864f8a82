"""Pruning in one call: exact zeros, the right ones, everything else untouched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

import clipjax
from clipjax import allocations, patterns, scores
from helpers import assert_same, normal, x64

SHAPES = {"a": {"kernel": (9, 11), "bias": (11,)}, "b": {"kernel": (11, 5)}}


def kept(size, sparsity):
    return size - int(np.ceil(sparsity * size - 1e-9))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_smallest_become_zero_and_the_rest_stays(dtype):
    with x64(dtype == "float64"):
        params = normal(SHAPES, dtype=dtype)
        options = {"sparsity": 0.7, "allocation": allocations.uniform}
        pruned = jax.jit(functools.partial(clipjax.prune, **options))(params)
        assert_same(pruned["a"]["bias"], params["a"]["bias"], rtol=0)
        for name in ("a", "b"):
            x = np.asarray(params[name]["kernel"], np.float64)
            order = np.argsort(-np.abs(x), axis=None, kind="stable")
            mask = np.zeros(x.size, bool)
            mask[order[: kept(x.size, 0.7)]] = True
            expected = jnp.asarray(np.where(mask.reshape(x.shape), x, 0), dtype)
            assert_same(pruned[name]["kernel"], expected, rtol=0)
            assert not np.signbit(np.asarray(pruned[name]["kernel"]))[
                ~mask.reshape(x.shape)
            ].any()


def test_what_is_not_kept_is_zero_even_if_it_is_not_a_number():
    params = {"kernel": jnp.array([[jnp.nan, 1.0, -jnp.inf, 3.0]])}
    pruned = jax.jit(functools.partial(clipjax.prune, sparsity=0.5))(params)
    assert_same(pruned, {"kernel": jnp.array([[0.0, 0.0, -jnp.inf, 3.0]])})


def test_a_function_or_a_tree_may_score():
    params = {"a": {"kernel": normal((4, 6))}, "b": {"kernel": normal((4, 6), seed=1)}}

    @jax.jit
    def results(params):
        inverse = jax.tree.map(lambda x: -jnp.abs(x), params)
        scores = (lambda p, u: -jnp.abs(p)), inverse, inverse | {"b": None}
        return [clipjax.prune(params, 0.5, score=score) for score in scores]

    by_function, by_tree, partly = results(params)
    assert_same(by_tree, by_function, rtol=0)
    assert abs(by_function["a"]["kernel"]).max() < abs(params["a"]["kernel"]).max()
    assert_same(partly["b"], params["b"], rtol=0)
    assert_same(partly["a"], by_function["a"], rtol=0)


def test_pattern_allocation_and_where_are_those_of_sparsify():
    params = normal(SHAPES | {"c": {"kernel": (8, 16)}})

    def pattern(path, leaf):
        assert leaf.shape == (8, 16) or path != "c/kernel"
        return patterns.NofM(1, 4) if path == "c/kernel" else patterns.Unstructured()

    pruned = jax.jit(
        functools.partial(
            clipjax.prune,
            pattern=pattern,
            allocation=allocations.global_,
            where=lambda path, leaf: path.endswith("kernel"),
        )
    )(params, jnp.float32(0.6))
    groups = np.asarray(pruned["c"]["kernel"]).reshape(8, 4, 4)
    assert ((groups != 0).sum(-1) == 1).all()
    both = sum(int((pruned[name]["kernel"] != 0).sum()) for name in "ab")
    assert both == kept(99 + 55, 0.6)


def test_a_tree_of_random_scores_prunes_at_random():
    params = {"kernel": jnp.ones((40, 50))}
    score = scores.random(jax.random.key(0), params)
    pruned = jax.jit(lambda params: clipjax.prune(params, 0.8, score=score))(params)
    rows = np.count_nonzero(pruned["kernel"], axis=1)
    assert rows.sum() == 400
    assert 0 < rows.min() < rows.max() < 30


def test_what_cannot_score_is_refused():
    params = {"kernel": jnp.ones((3, 4))}
    with pytest.raises(TypeError, match=r"^score must not need a memory"):
        clipjax.prune(params, 0.5, score=scores.Movement())
    with pytest.raises(ValueError, match=r"^score has no leaf .*'other'.*'kernel'"):
        clipjax.prune(params, 0.5, score={"other": jnp.ones((3, 4))})
    with pytest.raises(ValueError, match=r"^score must return .* at 'kernel'"):
        clipjax.prune(params, 0.5, score={"kernel": jnp.ones(4)})
    with pytest.raises(ValueError, match=r"^sparsity must lie between 0 and 1"):
        clipjax.prune(params, 1.5)
    with pytest.raises(TypeError, match=r"^pattern must be .*Pass an instance"):
        clipjax.prune(params, 0.5, pattern=patterns.NofM)


@pytest.mark.parametrize("tree", [{}, (), {"a": None}], ids=str)
def test_there_may_be_nothing_to_prune(tree):
    assert clipjax.prune(tree, 0.5) == tree


def test_sharding_stays_and_nothing_is_gathered():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    params = {"kernel": normal((16, 24))}
    there = jax.device_put(params, jax.NamedSharding(mesh, P("d")))
    compiled = jax.jit(clipjax.prune).lower(there, 0.5).compile()
    assert "all-gather" not in compiled.as_text()
    pruned = jax.jit(clipjax.prune)(there, 0.5)
    assert pruned["kernel"].sharding.is_equivalent_to(there["kernel"].sharding, 2)
    assert_same(
        jax.device_get(pruned), jax.device_get(clipjax.prune(params, 0.5)), rtol=0
    )

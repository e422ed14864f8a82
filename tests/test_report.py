"""`report` counts what is there, and lays it out to be read."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn, nnx

import clipjax

PARAMS = {
    "a": {"kernel": jnp.array([[1.0, 0.0], [-0.0, jnp.nan]], jnp.bfloat16)},
    "b": jnp.zeros((0, 3)),
    "step": jnp.int32(7),
    "rest": None,
}


def test_it_counts_entries_zeros_and_bytes():
    report = clipjax.report(PARAMS)
    rows = {row.path: row for row in report.rows}
    assert list(rows) == ["a/kernel", "b", "step"]
    assert rows["a/kernel"][1:] == ((2, 2), "bfloat16", 4, 2, 8)
    assert rows["a/kernel"].sparsity == 0.5
    assert rows["b"].sparsity == 0.0
    assert report.total[3:] == (5, 3, 12)


def test_an_empty_tree_has_an_empty_table():
    report = clipjax.report({})
    assert report.rows == ()
    assert report.total[3:] == (0, 0, 0)
    assert "total" in str(report)


def test_columns_stand_under_their_headings():
    params = {"a_rather_long_name": jnp.ones((1000, 1000)), "b": jnp.zeros(3)}
    head, rule, first, second, _, total = str(clipjax.report(params)).splitlines()
    assert len(rule) == len(head) == len(first) == len(second) == len(total)
    for heading in ("entries", "non-zeros", "sparsity", "bytes"):
        end = head.index(heading) + len(heading)
        assert all(line[end - 1] != " " for line in (first, second, total))
    assert "1,000,000" in first
    assert "100.0 %" in second


def test_a_notebook_shows_html_in_which_names_are_escaped():
    html = clipjax.report({"<b>": jnp.ones(2)})._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert html.count("<tr>") == 3


def test_linen_nnx_and_numpy_give_the_same_table():
    kernel = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = kernel["kernel"], kernel["bias"]
    linen = clipjax.report(kernel)
    assert linen == clipjax.report(nnx.state(layer, nnx.Param))
    assert linen == clipjax.report(layer)
    assert linen == clipjax.report(jax.tree.map(np.asarray, kernel))


def test_random_keys_are_no_parameters():
    assert clipjax.report({"key": jax.random.key(0)}).rows == ()

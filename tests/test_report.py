"""The table of a network: its numbers, its columns, its HTML."""

import html.parser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import clipjax
from helpers import relaxed

PARAMS = {
    "dense": {
        "kernel": jnp.array([[1.0, 0.0], [0.0, -0.0], [jnp.nan, 2.0]]),
        "bias": jnp.zeros(2, jnp.bfloat16),
    },
    "empty": jnp.zeros((0, 4)),
    "scalar": jnp.float32(3),
}


def test_rows_hold_the_numbers():
    rows = {row.path: row for row in clipjax.report(PARAMS).rows}
    assert [*rows] == ["dense/bias", "dense/kernel", "empty", "scalar"]
    kernel = rows["dense/kernel"]
    assert kernel == ("dense/kernel", (3, 2), "float32", 6, 3, 24)
    assert kernel.sparsity == 0.5
    assert rows["dense/bias"] == ("dense/bias", (2,), "bfloat16", 2, 0, 4)
    assert rows["dense/bias"].sparsity == 1
    assert rows["empty"].sparsity == 0
    assert rows["scalar"][1:] == ((), "float32", 1, 1, 4)


def test_the_total_is_that_of_all_rows():
    total = clipjax.report(PARAMS).total
    assert (total.entries, total.nonzeros, total.bytes) == (9, 4, 32)
    assert total.sparsity == pytest.approx(5 / 9)


def test_a_large_total_is_no_int32():
    row = clipjax.report({"w": np.zeros(1)}).rows[0]
    big = row._replace(entries=2**31, nonzeros=2**30, bytes=2**33)
    total = type(clipjax.report({}))((big, big)).total
    assert (total.entries, total.bytes, total.sparsity) == (2**32, 2**34, 0.5)


def test_columns_are_aligned():
    lines = str(clipjax.report(PARAMS)).splitlines()
    head, first_rule, *body, last_rule, total = lines
    assert head.split() == [
        *("path", "shape", "dtype", "entries", "non-zeros", "sparsity", "bytes")
    ]
    assert {first_rule, last_rule} == {"─" * len(head)}
    assert max(map(len, lines)) == len(head)
    assert len(body) == 4
    for word in ("entries", "non-zeros", "sparsity", "bytes"):  # numbers end alike
        end = head.index(word) + len(word)
        for line in (*body, total):
            assert line[end - 1] != " "
            assert line[end : end + 1] in ("", " ")
    for word in ("shape", "dtype"):  # words begin alike
        start = head.index(word)
        assert all(line[start - 2 : start] == "  " for line in (*body, total))
    assert not any(line.endswith(" ") for line in lines)


def test_large_numbers_are_grouped():
    text = str(clipjax.report({"w": jnp.ones((1000, 1200))}))
    for part in ("1,200,000", "4,800,000", "0.0 %", "1000×1200"):
        assert part in text


def test_repr_is_the_table():
    assert repr(clipjax.report(PARAMS)) == str(clipjax.report(PARAMS))


def test_nothing_is_a_table_too():
    assert str(clipjax.report({})).splitlines()[-1].split() == [
        "total",
        "0",
        "0",
        "0.0",
        "%",
        "0",
    ]


class Cells(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.rows = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.tags.pop() == tag

    def handle_data(self, data):
        self.rows[-1].append(data)


def test_html_holds_the_same_cells():
    cells = Cells(clipjax.report(PARAMS)._repr_html_())
    assert cells.tags == []  # each is closed
    assert len(cells.rows) == 6
    assert cells.rows[2] == ["dense/kernel", "3×2", "float32", "6", "3", "50.0 %", "24"]
    assert cells.rows[-1] == ["total", "9", "4", "55.6 %", "32"]


def test_html_escapes_names():
    text = clipjax.report({"<script>": jnp.ones(2), "a&b": jnp.ones(1)})._repr_html_()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "a&amp;b" in text


def test_linen_nnx_and_numpy_give_the_same_table():
    with relaxed():
        params = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    nnx.update(layer, params)
    expected = clipjax.report(params)
    assert {row.path: row.shape for row in expected.rows} == {
        "bias": (3,),
        "kernel": (2, 3),
    }
    forms = [
        layer,
        nnx.state(layer, nnx.Param),
        nnx.to_pure_dict(nnx.state(layer, nnx.Param)),
        jax.tree.map(np.asarray, params),
    ]
    assert [clipjax.report(form) for form in forms] == [expected] * 4


def test_random_keys_are_no_parameters():
    assert clipjax.report({"key": jax.random.key(0)}).rows == ()


def test_sparsified_parameters_show_their_zeros():
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(10, 10)))}
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    tx = clipjax.sparsify(0.9)
    updates, _ = tx.update(params, tx.init(params), params)
    after = {"kernel": params["kernel"] + updates["kernel"]}
    assert clipjax.report(after).total.sparsity == pytest.approx(0.9)

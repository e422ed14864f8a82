"""What every transform promises, whatever it does. A new one is a row of the table.

Tests come in the order of the rows, so that a process compiles each transform once.
"""

import functools
import math
import re

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from flax.training.train_state import TrainState
from jax import P

from clipjax import adaptive_clip, sparsify
from helpers import assert_same, normal, relaxed, spec, x64
from transforms import TRANSFORMS

# One tree, so that a process compiles each `update` once for most of the tests.
SHAPES = {  # on a mesh split along axis 0, along axis 1, and not at all
    "rows": {"kernel": (16, 24)},
    "columns": {"kernel": (8, 64)},
    "whole": {"bias": (13,)},
}
SPECS = {
    "rows": {"kernel": P("devices")},
    "columns": {"kernel": P(None, "devices")},
    "whole": {"bias": P()},
    "frozen": None,
    "table": P(),
}
GROWTH = [1, 1, 2, 7, 7]  # of the updates, so that what goes by the past has to act


@pytest.fixture(scope="module", params=TRANSFORMS)
def name(request):
    return request.param


@pytest.fixture
def row(request, name):
    """The transform, unless its row says why it cannot be tested like this."""
    row = TRANSFORMS[name]
    for promise in request.node.iter_markers("promise"):
        if reason := row.cannot.get(promise.args[0]):
            pytest.skip(reason)
    return row


promise = pytest.mark.promise  # its name in the table


def networks(count, shapes=SHAPES, *, dtype="float32"):
    """Params with some zeros, then updates: floats, and what is not trained."""
    params, *updates = [
        jax.device_get(normal(shapes, seed=seed, dtype=dtype))
        | {"frozen": None, "table": jnp.arange(4, dtype=jnp.int32)}
        for seed in range(count)
    ]
    # By NumPy, which need not compile it for every shape and dtype.
    params = map_floats(lambda p: np.where(np.abs(p) < 0.1, p.dtype.type(0), p), params)
    growing = zip(GROWTH[1:], updates, strict=False)
    grown = [map_floats(lambda u, g=g: u * u.dtype.type(g), u) for g, u in growing]
    return jax.device_put([params, *grown])


def dense(tree):
    """What every wrapper of optax can take."""
    return {name: tree[name] for name in ("rows", "columns", "whole")}


def run(update, state, params, *updates):
    """All outgoing updates, and the last state."""
    results = []
    for incoming in updates:
        outgoing, state = update(incoming, state, params)
        results.append(outgoing)
    return results, state


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def map_floats(function, tree):
    return jax.tree.map(
        lambda x: function(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree
    )


def filled(tree, value):
    return map_floats(lambda leaf: jnp.full_like(leaf, value), tree)


def with_value(tree, value):
    """Puts a value into one entry of one kernel."""
    kernel = tree["rows"]["kernel"].at[3, 5].set(value)
    return tree | {"rows": {"kernel": kernel}}


# Trees, dtypes, states


def assert_structure_survives(tx, update, params, *updates):
    first = tx.init(params)
    results, last = run(update, first, params, *updates)
    for incoming, outgoing in zip(updates, results, strict=True):
        assert spec(outgoing) == spec(incoming)
    assert_same(integers(results[0]), integers(updates[0]), rtol=0)
    assert spec(last) == spec(first)
    chex.assert_tree_all_finite((results, last))
    for before, after in zip(*map(kernels, (updates, results)), strict=True):
        assert (before != after).any()  # it acts
    assert (own_step(first), own_step(last)) == (0, len(updates))


def kernels(trees):
    """Each of them in all steps."""
    steps = zip(*map(jax.tree.leaves, trees), strict=True)
    return [np.stack(leaves) for leaves in steps if leaves[0].ndim == 2]


def integers(trees):
    leaves = jax.tree.leaves(trees)
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.integer)]


def own_step(state):
    """Not that of a clip inside."""
    return optax.tree.get_all_with_path(state, "step")[0][1]


def test_structure_and_dtypes_survive(row):
    assert_structure_survives(row.tx, row.update, *networks(4))
    shapes = {"kernel": (20, 13), "gain": ()}

    def together(*dtypes):
        trees = [networks(4, shapes, dtype=dtype) for dtype in dtypes]
        return [
            dict(zip(dtypes, step, strict=True)) for step in zip(*trees, strict=True)
        ]

    tx, (params, updates, *_) = row.make(), together("bfloat16", "float16")
    first = jax.eval_shape(tx.init, params)
    after = jax.eval_shape(tx.update, updates, first, params)
    assert spec(after) == spec((updates, first))
    with x64():
        tx, trees = row.make(), together("bfloat16", "float16", "float64")
        assert_structure_survives(tx, jax.jit(tx.update), *trees)


def test_state_is_a_named_tuple_of_arrays_had_without_running_init(row):
    params = networks(1)[0]
    state = row.tx.init(params)
    assert isinstance(state, tuple)
    assert hasattr(state, "_fields")
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert own_step(state).dtype == jnp.int32
    shapes = jax.eval_shape(row.tx.init, params)
    assert spec(shapes) == spec(state)


SHARED = ("step", "clip")  # what the last step was like, which all clips record


def test_state_fields_are_unique():
    kinds = set()

    def visit(node):
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            kinds.add(type(node))
            for child in node:
                visit(child)

    for row in TRANSFORMS.values():
        visit(jax.eval_shape(row.tx.init, networks(1)[0]))
    fields = [field for kind in kinds for field in kind._fields if field not in SHARED]
    assert len(kinds) >= 12
    assert sorted(fields) == sorted(set(fields))


def test_trees_of_any_kind(row):
    """Bare arrays, small and empty ones, no update at a parameter, and no arrays."""
    odd = {"gain": (), "none": (0, 4), "one": (1, 1), "left": {"kernel": (4, 3)}}
    params, updates = normal(odd, seed=0), normal(odd, seed=1)
    missing = {"left": {"kernel": None}, "gain": None}
    missing["table"] = np.zeros(4, jax.dtypes.float0)  # of `allow_int=True`
    trees = [(params | {"table": np.arange(4, dtype=np.int32)}, updates | missing)]
    trees += [(x, x) for x in (params["gain"], jnp.zeros((2, 0, 3), jnp.float32))]
    trees += [({}, {}), ((), ()), ({}, None), ({"a": None}, {"a": None})]

    @jax.jit
    def each(trees):
        states = [row.tx.init(params) for params, _ in trees]
        steps = zip(trees, states, strict=True)
        return states, [row.tx.update(u, state, p) for (p, u), state in steps]

    states, results = each(trees)
    assert results[0][0].pop("table").dtype == jax.dtypes.float0
    del trees[0][1]["table"]
    for (_, incoming), state, step in zip(trees, states, results, strict=True):
        assert spec(step) == spec((incoming, state))
    chex.assert_tree_all_finite(results)


COMPILED = []  # the seconds of each compilation
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: (
        COMPILED.append(seconds) if event.endswith("backend_compile_duration") else None
    )
)


def test_outside_of_jit_the_second_call_compiles_and_keeps_nothing(row):
    """With arrays of NumPy."""
    params, updates = (jax.tree.map(np.asarray, tree) for tree in networks(2))
    state = row.tx.init(params)
    changed, state = row.tx.update(updates, state, params)
    assert spec(changed) == spec(updates)
    changed, state = row.tx.update(updates, state, params)  # the state is JAX's now
    before, arrays = len(COMPILED), len(jax.live_arrays())
    assert before
    for _ in range(20):
        changed, state = row.tx.update(updates, state, params)
        assert len(COMPILED) == before
    assert len(jax.live_arrays()) <= arrays
    chex.assert_tree_all_finite((changed, state))


def test_without_params_it_works_or_says_why(row):
    params, updates = networks(2)
    state = row.tx.init(params)
    if row.reads_params:
        message = r"params is None.*tx.update\(updates, state, params\)"
        with pytest.raises(ValueError, match=message):
            row.tx.update(updates, state)
    else:
        after = jax.eval_shape(row.tx.update, updates, state)
        assert spec(after) == spec((updates, state))


# Compilation


def test_steps_in_place_and_in_a_scan_compile_once(row):
    chex.clear_trace_counter()  # it goes by the name of the function
    params, *updates = networks(5)
    results, last = run(row.update, row.tx.init(params), params, *updates)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @functools.partial(chex.assert_max_traces, n=1)
    def scan(params, state, stacked):
        def body(state, incoming):
            outgoing, state = row.tx.update(incoming, state, params)
            return state, outgoing

        state, outgoing = jax.lax.scan(body, state, stacked)
        return params, state, outgoing

    start = row.tx.init(networks(1)[0])  # arrays of its own, to be donated
    params, state, first = scan(params, start, stack(updates[:2]))
    params, state, second = scan(params, state, stack(updates[2:]))
    actual = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first, second)
    atol = 5e-7 if row.differences else 0.0
    assert_same((state, actual), (last, stack(results)), atol=atol)


# Optax around it


def everywhere(label):
    return lambda tree: jax.tree.map(lambda _: label, tree)


def of_dense(tree):
    return {name: "dense" if name in dense(tree) else "rest" for name in tree}


def injected(row):
    """Its tuned argument among the state's hyperparameters, if it has one."""
    if "injected" in row.cannot:
        return row.tx
    factory = functools.partial(row.factory, **row.options)
    options = {"static_args": row.static, "hyperparam_dtype": jnp.float32}
    return optax.inject_hyperparams(factory, **options)(**row.tuned)


def test_in_all_wrappers_it_does_the_same_and_masked_leaves_pass(row):
    """Those that it is shown are treated as if they were all there is.

    What `optax.partition` wraps it in is `optax.masked`, and `optax.MultiSteps` hands
    it the mean of two. Extra arguments are meant for others.
    """
    assert isinstance(row.tx, optax.GradientTransformationExtraArgs)
    params, *updates = networks(3)
    expected, _ = run(row.update, row.tx.init(params), params, *updates)
    steps = optax.MultiSteps(injected(row), 2)
    mean = optax.GradientTransformationExtraArgs(steps.init, steps.update)
    split = optax.partition({"dense": mean, "rest": optax.identity()}, of_dense)
    chain = optax.named_chain(("first", optax.identity()), ("second", split))
    wrapped = optax.apply_if_finite(optax.chain(optax.identity(), chain), 3)
    update = jax.jit(functools.partial(wrapped.update, value=1.0, batch={"x": 2}))
    params = params | {"gain": jnp.float32(9)}
    with relaxed():
        first = state = wrapped.init(params)
        for given, own in zip(updates, expected, strict=True):
            nothing = filled(params, 0)
            outgoing, state = update(nothing, state, params)
            chex.assert_trees_all_equal(outgoing, nothing)
            twice = params | map_floats(lambda u: 2 * u, given)
            outgoing, state = update(twice, state, params)
            assert_same(outgoing, twice | own)
    assert spec(state) == spec(first)
    if "injected" not in row.cannot:
        values = optax.tree.get(state, "hyperparams")
        assert values[row.argument] == jnp.float32(row.tuned[row.argument])


# Traced and scheduled hyperparameters


@promise("a population")
def test_a_population_of_schedules_runs_under_vmap(row):
    params, *updates = networks(5)
    factors = jnp.array([0.5, 1.0, 1.5], jnp.float32)
    values = jnp.float32(row.tuned[row.argument]) * factors

    def schedule(value):
        return lambda step: value * (1 - step.astype(jnp.float32) / 16)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, 0, None))
    def population(value, *arguments):
        return row.make(schedule(value)).update(*arguments)

    def each(incoming, state, params):
        return population(values, incoming, state, params)

    start, members = row.tx.init(params), []
    for value in values:
        state, results = start, []
        for step, incoming in enumerate(updates):
            now = schedule(value)(jnp.int32(step))
            outgoing, state = row.update_with(now, incoming, state, params)
            results.append(outgoing)
        members.append((results, state))
    together = run(each, stack([start] * 3), params, *updates)
    assert_same(together, stack(members), atol=1e-7)
    kernels = np.stack([tree["rows"]["kernel"] for tree in together[0]], axis=1)
    assert len(np.unique(kernels, axis=0)) == 3  # each value counts


# Bad steps

BAD = [np.nan, np.inf, -np.inf]


@promise("going on")
def test_after_a_bad_step_all_goes_on_as_before(row):
    params, *updates = networks(5)
    start = row.tx.init(params)
    _, later = run(row.update, start, params, *updates[:2])
    for bad in BAD:
        everything = filled(updates[0], bad)
        one = with_value(updates[0], bad)
        for state, broken in ((start, everything), (later, one)):
            expected, _ = run(row.update, state, params, *updates[2:])
            _, after = row.update(broken, state, params)
            results, last = run(row.update, after, params, *updates[2:])
            assert_same(results, expected, rtol=0)
            chex.assert_tree_all_finite((after, last))


def test_nothing_bad_enters_the_state(row):
    params, *updates = networks(3)
    start = row.tx.init(params)
    for bad in [*BAD, 3e38]:
        for broken in (with_value(params, bad), filled(params, bad)):
            _, last = run(row.update, start, broken, *updates)
            chex.assert_tree_all_finite(last)
        _, last = run(row.update, start, params, filled(updates[0], bad), *updates)
        chex.assert_tree_all_finite(last)
    for size in (1e-45, 1e-38, 1e-30, 1e30, 3e38):
        extreme = map_floats(lambda u, size=size: jnp.clip(u, -1, 1) * size, updates[0])
        results, last = run(row.update, start, params, extreme, *updates)
        chex.assert_tree_all_finite((results, last))


# Flax: ways to the same parameters


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False, name="conv")(x)
        return nn.Dense(5, use_bias=False, name="dense")(x.reshape(x.shape[0], -1))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 8, (3, 3), use_bias=False, rngs=rngs)
        self.dense = nnx.Linear(6 * 6 * 8, 5, use_bias=False, rngs=rngs)


def gradients(params, step):
    """Entry by entry, so that every framework computes the same bits.

    They grow, so that what clips by the past has something to clip.
    """
    return jax.tree.map(lambda p: p * 30 * 2**step + 1, params)


STEPS = 3


def train_linen(tx, params):
    state = TrainState.create(apply_fn=LinenNet().apply, params=params, tx=tx)
    apply = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for step in range(STEPS):
        state = apply(state, gradients(state.params, step))
    return state.params


def train_nnx(tx, params):
    model = NNXNet(nnx.Rngs(0))
    nnx.update(model, params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    apply = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))
    for step in range(STEPS):
        apply(model, optimizer, gradients(nnx.state(model, nnx.Param), step))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def train_functional_nnx(tx, params):
    model = NNXNet(nnx.Rngs(0))
    nnx.update(model, params)
    _, own = nnx.split(model, nnx.Param)
    state = tx.init(own)

    @jax.jit
    def apply(own, state, grads):
        updates, state = tx.update(grads, state, own)
        return optax.apply_updates(own, updates), state

    for step in range(STEPS):
        own, state = apply(own, state, gradients(own, step))
    return nnx.to_pure_dict(own)


@pytest.fixture(scope="module")
def linen_params():
    with relaxed():
        images = jnp.zeros((1, 6, 6, 2), jnp.float32)
        params = LinenNet().init(jax.random.key(0), images)["params"]
        return jax.tree.map(lambda p: jnp.where(jnp.abs(p) < 0.01, 0, p), params)


def with_sgd(row=None):
    sgd = optax.sgd(0.01)
    if row is None:
        return sgd
    return optax.chain(sgd, row.tx) if row.last else optax.chain(row.tx, sgd)


@pytest.fixture(scope="module")
def untouched(linen_params):
    """What the optimizer alone makes of them."""
    with relaxed():
        return train_linen(with_sgd(), linen_params)


def test_linen_and_nnx_get_the_same_bits(row, linen_params, untouched):
    tx = with_sgd(row)
    with relaxed():
        expected = train_linen(tx, linen_params)
        assert_same(train_nnx(tx, linen_params), expected, rtol=0)
    assert not np.array_equal(expected["dense"]["kernel"], untouched["dense"]["kernel"])


CHAIN = optax.chain(adaptive_clip(), with_sgd(), sparsify(0.6))


@pytest.fixture(scope="module")
def trained(linen_params):
    with relaxed():
        return train_linen(CHAIN, linen_params)


WRAPPERS = {
    "masked": lambda tx: optax.masked(tx, everywhere(True)),
    "partition": lambda tx: optax.partition({"all": tx}, everywhere("all")),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


def test_nnx_split_into_graph_and_parameters_trains(linen_params, trained):
    with relaxed():
        assert_same(train_functional_nnx(CHAIN, linen_params), trained, rtol=0)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_it_trains_in_nnx(wrapper, linen_params, trained):
    old = tuple(map(int, flax.__version__.split(".")[:2])) < (0, 12)
    if old and wrapper != "apply_if_finite":
        pytest.skip("a `MaskedNode` does not fit into the optimizer of this flax")
    with relaxed():
        assert_same(train_nnx(WRAPPERS[wrapper](CHAIN), linen_params), trained)
    kernels = [layer["kernel"].ravel() for layer in trained.values()]
    assert 0.59 < (jnp.concatenate(kernels) == 0).mean() < 0.61


# Eight devices

MOST_BYTES = 512  # in one all-reduce: some norms or counts, never a parameter
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|ragged-all-to-all"
    r"|collective-permute|collective-broadcast)(?:-start)?\("
)
BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f64": 8, "s64": 8, "u64": 8}


def devices(kind):
    axis_type = getattr(jax.sharding.AxisType, kind)
    return jax.make_mesh((8,), ("devices",), axis_types=(axis_type,))


def collectives(compiled):
    """Kind and bytes of every exchange in a compiled program."""
    for result, kind in COLLECTIVE.findall(compiled.as_text()):
        sizes = [
            BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n)
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
        ]
        yield kind, sum(sizes)


def put(tree, mesh):
    shardings = jax.tree.map(functools.partial(jax.NamedSharding, mesh), SPECS)
    return jax.device_put(tree, shardings)


@functools.lru_cache(maxsize=1)  # tests come in the order of the rows
def on_one_device(name):
    params, *updates = networks(3)
    row = TRANSFORMS[name]
    return run(row.update, row.tx.init(params), params, *updates)


def assert_same_as_on_one(name, actual):
    """Zeros stand in the same places; sums may be rounded in another order."""
    actual, expected = jax.device_get((actual, on_one_device(name)))
    atol = 5e-7 if TRANSFORMS[name].differences else 0.0
    assert_same(actual, expected, rtol=1e-6, atol=atol)
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_array_equal(one == 0, other == 0)


@promise("a mesh")
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_mesh_changes_nothing_and_gathers_nothing(name, row, kind):
    mesh, tx = devices(kind), row.make()
    params, *updates = (put(tree, mesh) for tree in networks(3))
    # Arguments that only lend their types are dropped, and the mesh with them.
    first = jax.jit(tx.init, keep_unused=True)(params)
    compiled = jax.jit(tx.update).lower(updates[0], first, params).compile()
    for exchange, size in collectives(compiled):
        assert exchange == "all-reduce"
        assert size <= MOST_BYTES

    def update(*arguments):
        return compiled(*jax.device_put(arguments, compiled.input_shardings[0]))

    results, last = run(update, first, params, *updates)
    assert_same_as_on_one(name, (results, last))
    leaves = zip(*map(jax.tree.leaves, (results, updates)), strict=True)
    for outgoing, incoming in leaves:
        assert outgoing.sharding.is_equivalent_to(incoming.sharding, incoming.ndim)


def state_specs(state, params):
    """What has a parameter's path and rank is split as it is, all else is whole."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    ranks = {path_of(keys): leaf.ndim for keys, leaf in leaves}

    def one(keys, leaf):
        names = [getattr(key, "key", None) for key in keys]
        names.append("/".join(map(str, names[-2:])))  # of a tree like the parameters
        name = next((name for name in names if name in ranks), None)
        return spec_of(name) if name and leaf.ndim >= ranks[name] > 0 else P()

    return jax.tree_util.tree_map_with_path(one, state)


def path_of(keys):
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def spec_of(path, leaf=None):
    del leaf
    return functools.reduce(lambda node, name: node[name], path.split("/"), SPECS)


@promise("shard_map")
def test_shard_map_changes_nothing(name, row):
    params, *updates = networks(3)

    tx = row.make(axis_name="devices", specs=spec_of)
    state_spec = state_specs(jax.eval_shape(tx.init, params), params)
    mapped = functools.partial(jax.shard_map, mesh=devices("Auto"))
    init = mapped(tx.init, in_specs=(SPECS,), out_specs=state_spec)
    update = mapped(
        lambda *arguments: tx.update(*arguments),
        in_specs=(SPECS, state_spec, SPECS),
        out_specs=(SPECS, state_spec),
    )
    actual = run(jax.jit(update), jax.jit(init)(params), params, *updates)
    assert_same_as_on_one(name, actual)

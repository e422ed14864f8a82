"""What moves zeros is reported, from the state alone; what does not is not."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import clipjax
from clipjax import contrib
from helpers import relaxed

ADAM = optax.adam(1e-2)
S = clipjax.sparsify(0.5)
INSIDE = optax.chain(ADAM, S)


def everywhere(label):
    return lambda tree: jax.tree.map(lambda _: label, tree)


FINE = {
    "chain": INSIDE,
    "nothing sparse": ADAM,
    "nested": optax.chain(optax.clip(1.0), optax.chain(ADAM, optax.chain(S))),
    "named": optax.named_chain(("z", ADAM), ("a", S)),
    "keep_zeros": optax.chain(ADAM, clipjax.constraints.keep_zeros()),
    "two": optax.chain(S, optax.scale(0.1), clipjax.constraints.keep_zeros(), S),
    "snapshot": optax.chain(INSIDE, optax.snapshot("moved", lambda u: u)),
    "MultiSteps": optax.MultiSteps(INSIDE, 2),
    "masked": optax.masked(INSIDE, everywhere(True)),
    "partition": optax.partition({"x": INSIDE, "y": ADAM}, everywhere("x")),
    "apply_if_finite": optax.apply_if_finite(INSIDE, 3),
    "conditionally_mask": optax.conditionally_mask(INSIDE, lambda step, **_: step > 3),
    "inject_hyperparams": optax.chain(optax.inject_hyperparams(optax.sgd)(0.1), S),
    "mechanize before": optax.chain(optax.contrib.mechanize(ADAM), S),
}


@pytest.mark.parametrize("name", FINE)
def test_nothing_is_said_where_zeros_last(name):
    with relaxed():
        assert clipjax.lint(FINE[name]) == []


FREE = optax.contrib.schedule_free
REPORTED = {  # where, and a word of what is said
    "scale": (optax.chain(ADAM, S, optax.scale(0.1)), "2", "EmptyState follows"),
    "decay": (optax.chain(INSIDE, optax.add_decayed_weights(0.1)), "1", "follows"),
    "noise": (optax.chain(S, optax.add_noise(0.1, 0.1, 0)), "1", "AddNoiseState"),
    "schedule": (optax.chain(S, optax.scale_by_schedule(lambda _: 1)), "1", "Schedule"),
    "ema": (optax.chain(S, optax.ema(0.9)), "1", "EmaState follows"),
    "apply_every": (optax.chain(S, optax.apply_every(2)), "1", "ApplyEvery follows"),
    "plateau": (
        optax.chain(INSIDE, optax.contrib.reduce_on_plateau()),
        "1",
        "ReduceLROnPlateauState follows",
    ),
    "before the optimizer": (optax.chain(S, ADAM), "1", "tuple follows"),
    "in a named chain": (
        optax.named_chain(("z", S), ("a", optax.scale(0.1))),
        "a",
        "follows",
    ),
    "in a wrapper": (
        optax.MultiSteps(optax.chain(S, optax.scale(0.1)), 2),
        "inner_opt_state/1",
        "follows",
    ),
    "after a wrapper": (
        optax.chain(optax.masked(INSIDE, everywhere(True)), optax.scale(0.1)),
        "1",
        "follows",
    ),
    "in a partition": (
        optax.partition({"x": optax.chain(S, optax.scale(0.1))}, everywhere("x")),
        "x/inner_state/1",
        "follows",
    ),
    "keep_zeros": (
        optax.chain(clipjax.constraints.keep_zeros(), optax.scale(0.1)),
        "1",
        "follows",
    ),
    "schedule_free": (FREE(INSIDE, 0.1), "", "other parameters.*finalize"),
    "lookahead": (optax.lookahead(INSIDE, 3, 0.5), "", "slow ones that are dense"),
    "mechanize": (optax.contrib.mechanize(INSIDE), "", "rescales the sum"),
    "sam": (optax.contrib.sam(INSIDE, ADAM), "", "sparse after these only"),
    "conditionally_transform": (
        optax.conditionally_transform(INSIDE, lambda step, **_: step > 3),
        "",
        "pass unprojected",
    ),
    "schedule_free before": (optax.chain(FREE(ADAM, 0.1), S), "0", "Call `finalize`"),
    "line search before": (optax.chain(optax.lbfgs(), S), "0", "stopped, before"),
    "flatten": (optax.flatten(INSIDE), "1", "chooses no leaf.*optax.flatten"),
}


@pytest.mark.parametrize("name", REPORTED)
def test_what_moves_zeros_is_reported(name):
    tx, place, message = REPORTED[name]
    params = {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    with relaxed():
        (finding,) = clipjax.lint(tx, params)
    assert finding.place == place
    assert message.split(".*")[0] in finding.message
    assert message.split(".*")[-1] in finding.message
    assert str(finding) == f"{place}: {finding.message}".removeprefix(": ")


def test_copies_of_lookahead_have_masks_of_their_own():
    params = optax.LookaheadParams.init_synced({"kernel": jnp.ones((8, 8))})
    tx = optax.chain(optax.lookahead(ADAM, 3, 0.5), S)
    (finding,) = clipjax.lint(tx, params)
    assert "each with masks of its own" in finding.message


def test_a_state_says_as_much_as_its_transform():
    params = {"kernel": jnp.ones((8, 8))}
    for tx in (INSIDE, REPORTED["scale"][0]):
        assert clipjax.lint(tx.init(params)) == clipjax.lint(tx, params)


def test_nnx_optimizers_show_the_same():
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    for tx in (INSIDE, REPORTED["scale"][0]):
        state = nnx.Optimizer(model, tx, wrt=nnx.Param).opt_state
        assert clipjax.lint(state) == clipjax.lint(tx)


@pytest.mark.parametrize(
    "tx",
    [
        clipjax.sparse(optax.adam(1e-3), 0.5),
        clipjax.latent(optax.adam(1e-3), 0.5),
        contrib.rewinding(optax.adam(1e-3), every=9, rounds=2),
        clipjax.proximal(clipjax.prox.L1(0.1), 1e-3),
        contrib.regularized_dual_averaging(0.1, 0.1),
    ],
    ids=["sparse", "latent", "rewinding", "proximal", "dual_averaging"],
)
def test_everything_that_sets_zeros_stands_last(tx):
    assert clipjax.lint(tx) == []
    (finding,) = clipjax.lint(optax.chain(tx, optax.scale(0.5)))
    assert "follows the projection" in finding.message

"""What users are told when an argument cannot be right: which, why, and what to do."""

import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import (
    allocations,
    contrib,
    latents as reparametrizations,
    masks,
    patterns,
    scores,
)
from clipjax._core import checks as check
from clipjax.thresholds import WindowedQuantile
from helpers import normal

ROOT = pathlib.Path(__file__).parents[1]
BOUNDS = {
    "max_delta": clipjax.clip,
    "max_norm": clipjax.clip_by_global_norm,
    "threshold": clipjax.clip_by_block_rms,
    "clipping": clipjax.adaptive_grad_clip,
}
each_bound = pytest.mark.parametrize(("name", "factory"), BOUNDS.items(), ids=BOUNDS)


@each_bound
@pytest.mark.parametrize("value", [-1.0, -1, float("nan"), jnp.float32(-0.5)])
def test_bounds_are_not_negative(name, factory, value):
    with pytest.raises(ValueError, match=rf"^{name} must not be negative, but is"):
        factory(value)


@pytest.mark.parametrize("value", [0, 0.0, 1, 2.5, jnp.float32(3), np.float64(1)])
def test_what_can_be_right_is_taken(value):
    for factory in BOUNDS.values():
        assert isinstance(factory(value), optax.GradientTransformationExtraArgs)


ADAPTIVE = [
    ({"factor": 0.0}, "factor must be positive, but is 0.0"),
    ({"growth": 0.9}, "growth must be at least 1, but is 0.9"),
    ({"start": 0}, "start must be positive, but is 0"),
    ({"start": float("nan")}, "start must be positive, but is nan"),
    ({"window": 1}, "window must be at least 2, but is 1"),
]


@pytest.mark.parametrize(("arguments", "message"), ADAPTIVE)
def test_arguments_of_adaptive_clip(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        clipjax.adaptive_clip(**arguments)
    if arguments.keys() & {"quantile", "factor", "window"}:  # of its history too
        with pytest.raises(ValueError, match=f"^{message}"):
            WindowedQuantile(**arguments)


SPARSIFY = [
    ({"sparsity": 1.1}, "sparsity must lie between 0 and 1, but is 1.1"),
    ({"sparsity": 90}, "sparsity must lie between 0 and 1, but is 90"),
    ({"sparsity": float("nan")}, "sparsity must lie between 0 and 1, but is nan"),
    ({"every": 0}, "every must be at least 1, but is 0"),
    ({"every": 0.5}, "every must be at least 1, but is 0.5"),
]


@pytest.mark.parametrize(("arguments", "message"), SPARSIFY)
def test_arguments_of_sparsify(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        clipjax.sparsify(**({"sparsity": 0.5} | arguments))


def test_eps_is_positive():
    with pytest.raises(ValueError, match=r"^eps must be positive, but is 0"):
        clipjax.adaptive_grad_clip(0.1, 0.0)


@pytest.mark.parametrize(
    ("factory", "name"),
    [
        (clipjax.sparsify, "sparsity"),
        (functools.partial(clipjax.latent, optax.identity()), "sparsity"),
        (functools.partial(contrib.zclip, warmup=2), "decay"),
    ],
)
def test_a_share_that_was_rounded_is_told(factory, name):
    """As `optax.inject_hyperparams` does it, by the dtype of the parameters."""
    tx = optax.inject_hyperparams(factory)(**{name: 0.999})
    with pytest.raises(ValueError, match=f"{name}.*0.999 to 1.*hyperparam_dtype"):
        tx.init({"kernel": jnp.ones((2, 2), jnp.bfloat16)})


# Wrong types: these tests run under a type checker, which users do not

WRONG = {
    "clipjax.clip('1')": "max_delta must be a number, a scalar array or a schedule",
    "clipjax.clip_by_global_norm(None)": "max_norm must be a number",
    "clipjax.clip_by_block_rms(numpy.ones(2))": "threshold must be a number",
    "clipjax.adaptive_grad_clip(True)": "clipping must be a number",
    "clipjax.adaptive_clip(window=4.0)": "window must be an integer, but is 4.0",
    "clipjax.adaptive_clip(factor='2')": "factor must be a number",
    "clipjax.sparsify('90%')": "sparsity must be a number",
    "clipjax.sparsify(0.5, every='2')": "every must be a number",
    "clipjax.sparsify(0.5, score='magnitude')": "score must be a function",
    "clipjax.sparsify(0.5, allocation=0.5)": "allocation must be a function",
    "clipjax.sparsify(0.5, where='kernel')": "where must be a function",
    "clipjax.sparsify(0.5, pattern=clipjax.patterns.Unstructured)": "Pass an instance",
    "clipjax.sparsify(0.5, storage='bits')": (
        "storage must be `Bits()`, `Booleans()` or `Zeros()`"
    ),
    "optax.inject_hyperparams(clipjax.adaptive_clip)(factor=2.0).init({})": (
        "name it in `static_args`"
    ),
    "optax.inject_hyperparams(clipjax.sparsify)(.5, score=clipjax.scores.magnitude)"
    ".init({})": ("score is static and must be a function"),
}


def test_wrong_types_are_told_in_our_own_words():
    code = f"""
import clipjax, numpy, optax
for call in {[*WRONG]!r}:
    try:
        eval(call)
    except TypeError as error:
        print(error)
    else:
        print("nothing")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    said = dict(zip(WRONG, done.stdout.splitlines(), strict=True))
    assert {call: WRONG[call] in said[call] for call in WRONG} == dict.fromkeys(
        WRONG, True
    ), said


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.5", r"number, a scalar array or a schedule, but is '0.5' of type str"),
        (None, r"number, a scalar array or a schedule, but is None of type NoneType"),
        (True, r"number, a scalar array or a schedule, but is True of type bool"),
        (
            np.ones(2),
            r"number, a scalar array or a schedule, but is array\(\[1., 1.\]\)",
        ),
    ],
)
def test_numbers_are_numbers(value, message):
    for function in (check.positive, check.not_negative):
        with pytest.raises(TypeError, match=rf"^max_norm must be a {message}"):
            function(max_norm=value)


@pytest.mark.parametrize("value", [2.0, "2", True, None])
def test_whole_numbers_are_integers(value):
    with pytest.raises(TypeError, match=r"^window must be an integer, but is"):
        check.whole(2, window=value)


def test_a_size_that_is_an_array_names_the_way_out():
    message = r"^window .*must be a Python integer.*`static_args`"
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda window: check.whole(2, window=window))(4)
    with pytest.raises(TypeError, match=message):
        check.whole(2, window=jnp.int32(4))


def test_a_function_is_the_function_itself():
    with pytest.raises(TypeError, match=r"^score must be a function.*function itself"):
        check.function(score="magnitude")


def test_a_score_is_an_instance_and_looks_the_right_way():
    with pytest.raises(TypeError, match=r"^score must be a value .* Pass an instance"):
        clipjax.sparsify(0.5, score=scores.Movement)
    for wrap in (clipjax.sparse, clipjax.latent):
        with pytest.raises(ValueError, match=r"^score is Movement.*gradients=True"):
            wrap(optax.sgd(0.1), 0.5, score=scores.Movement())


def test_one_number_is_no_schedule():
    for make in (
        lambda s: clipjax.prune({}, s),
        allocations.normalized,
        reparametrizations.soft_threshold,
        scores.Fisher,
        lambda s: clipjax.rigl(optax.sgd(1), 0.5, key=None, total_steps=9, stop=s),
    ):
        with pytest.raises(TypeError, match=r"must be a number, but is the function"):
            make(optax.constant_schedule(0.5))
        with pytest.raises(ValueError, match=r"must be a number, but is nan"):
            make(float("nan"))


@pytest.mark.parametrize("value", [patterns.Unstructured, "unstructured", None])
def test_a_pattern_is_an_instance(value):
    with pytest.raises(TypeError, match=r"^pattern must be .*method `masks`.*instance"):
        check.has_method("masks", pattern=value)


@pytest.mark.parametrize("value", [masks.Bits, "bits", None])
def test_a_storage_is_one_of_two_values(value):
    message = r"^storage must be `Bits\(\)` or `Zeros\(\)`, but is"
    with pytest.raises(TypeError, match=message):
        check.one_of(masks.Bits, masks.Zeros, storage=value)


def test_tracers_and_schedules_are_not_checked():
    @jax.jit
    def build(value):
        check.positive(x=value)
        check.not_negative(x=value)
        check.between(0, 1, x=value)
        check.at_least(1, x=value)
        return value

    assert build(-5.0) == -5.0
    check.between(0, 1, sparsity=lambda step: 7)


# While it runs


@pytest.mark.parametrize(
    ("name", "tx"),
    [
        ("A bound by `thresholds.Relative`", clipjax.adaptive_grad_clip(0.1)),
        ("sparsify", clipjax.sparsify(0.5)),
    ],
)
def test_params_are_asked_for(name, tx):
    params = {"kernel": jnp.ones((2, 2))}
    message = rf"^{name} reads the parameters, but params is None\. Call `tx\.update"
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params))


def test_updates_of_another_shape_are_refused():
    tx, params = clipjax.adaptive_grad_clip(0.1), {"a": {"kernel": jnp.ones((2, 3))}}
    message = r"^A bound by `thresholds.Relative` .*'a/kernel' .*\(3, 2\) .*\(2, 3\)"
    with pytest.raises(ValueError, match=message):
        tx.update({"a": {"kernel": jnp.ones((3, 2))}}, tx.init(params), params)


def test_updates_without_a_parameter_are_refused():
    tx, params = clipjax.adaptive_grad_clip(0.1), {"a": jnp.ones(2)}
    message = r"`thresholds.Relative` found no parameter for the update at 'b'"
    with pytest.raises(ValueError, match=message):
        tx.update({"b": jnp.ones(2)}, tx.init(params), params)


def test_two_leaves_at_one_path_are_refused():
    params = {"a": {"b": jnp.ones((2, 2))}, "a/b": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"^Two leaves share the path 'a/b'\. Rename"):
        clipjax.sparsify(0.5).init(params)


def test_a_sparsity_known_too_late_to_check_is_brought_into_range():
    params = {"kernel": normal((4, 4))}
    for value, share in [(7.0, 15 / 16), (-7.0, 0)]:
        tx = clipjax.sparsify(lambda step, value=value: value)
        _, state = jax.jit(tx.update)(params, tx.init(params), params)
        assert state.total_sparsity == share


def test_allocations_check_what_sparsify_gives_them():
    with pytest.raises(ValueError, match=r"^floor must be at least 0, but is -2"):
        allocations.uniform(["a"], [(2, 2)], 0.5, floor=-2)

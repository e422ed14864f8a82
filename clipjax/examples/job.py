"""A whole training as the command line runs it, with a bar to watch it by."""

import functools
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree
from tqdm.auto import tqdm

from .. import allocations, masks, report, sparsify
from .._core import trees
from . import data, nets, train


class Plan(NamedTuple):
    """What to train, and how."""

    net: nets.Net
    dataset: data.Dataset
    clip: optax.GradientTransformation
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation]
    learning_rate: float
    epochs: int
    batch_size: int
    shift: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """How many steps go through all the training images."""
        count = len(self.dataset.train.labels)
        return train.steps_per_epoch(count, batch_size=self.batch_size)


def chain(plan: Plan, *, sparsity: float) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the plan: clip, step, and prune.

    The learning rate warms up for a twentieth of the steps and then falls to 0 along a
    cosine.  The sparsity rises along a cubic from a tenth of the steps to six tenths.

    Args:
        plan: what to train, and how.
        sparsity: the final share of zeros in the pruned leaves; 0 prunes nothing.
    """
    steps = plan.steps_per_epoch * plan.epochs
    rate = optax.warmup_cosine_decay_schedule(
        0.0, plan.learning_rate, max(steps // 20, 1), max(steps, 2)
    )
    dense = optax.chain(plan.clip, plan.optimizer(rate))
    if not sparsity:
        return dense
    ramp: Any = optax.polynomial_schedule(
        0.0,
        sparsity,
        3,
        transition_steps=max(steps // 2, 1),
        transition_begin=steps // 10,
    )
    every = min(max(steps // 100, 1), 10)  # short runs must reach the last mask too
    return optax.chain(
        dense, sparsify(ramp, allocation=allocations.global_, every=every)
    )


def room(plan: Plan) -> int:
    """About how many bytes the files of a training take, without its history.

    Args:
        plan: what to train, and how.
    """
    shapes = _shapes(plan).values()
    return 500_000 + sum(x.size * x.dtype.itemsize for x in shapes)


def selected_sparsity(plan: Plan, sparsity: float) -> float:
    """The sparsity of the pruned leaves that gives all parameters a sparsity.

    Biases and scales are never pruned, so the other leaves make up for them.

    Args:
        plan: what to train, and how.
        sparsity: the share of zeros among all parameters.
    """
    shapes = _shapes(plan)
    leaves = {path: jnp.zeros(x.shape, x.dtype) for path, x in shapes.items()}
    whole = sum(leaf.size for leaf in leaves.values())
    pruned = sum(x.size for path, x in leaves.items() if masks.weights(path, x))
    allowed = math.floor((1 - sparsity) * whole + 1e-6)  # 0.1 is a little less
    kept = allowed - (whole - pruned)
    if sparsity and kept < pruned // 1000:
        raise ValueError(
            f"--sparsity {sparsity} leaves {allowed} parameters, but the biases and"
            " scales alone are nearly as many: choose a lower sparsity or another model"
        )
    return math.ceil((1 - kept / pruned) * 1e7) / 1e7 if sparsity else 0.0


def follow(plan: Plan, *, sparsity: float, stop: Callable[[], bool]) -> train.Trained:
    """Trains as planned, under a bar that shows how it goes.

    It ends after a part whose last loss, or whose parameters, are not finite, and
    returns parameters from before: `steps` is then less than the steps in `history`.

    Args:
        plan: what to train, and how.
        sparsity: the final share of zeros in the pruned leaves; 0 prunes nothing.
        stop: a function that is called after every part; True ends the training.
    """
    tx = chain(plan, sparsity=sparsity)
    first, later = jax.random.split(jax.random.key(plan.seed))
    run = train.loop(plan.net, tx, shift=plan.shift)
    orders = _orders(plan)
    logs, validation, failed = [], {}, False
    with _bar(plan, "sparse" if sparsity else "dense") as bar:
        state = train.start(plan.net, tx, shape=plan.dataset.shape, key=first)
        kept = now = state.params, 0
        parts = train.fit(run, state, plan.dataset.train, orders=orders, key=later)
        for state, log in parts:
            logs.append(log)
            bar.set_postfix_str(_words(log), refresh=False)
            bar.update(len(log["loss"]))
            if np.isfinite(log["loss"][0]):
                kept = now  # this was their loss
            now = state.params, int(bar.n)
            if bar.n % plan.steps_per_epoch == 0:
                validation[bar.n] = train.accuracy(
                    plan.net, state.params, plan.dataset.validation
                )
            failed = not _is_finite([state.params, log["loss"][-1]])
            if failed or stop():
                break
    params, steps = kept if failed else now
    return train.Trained(params, train.joined(logs), validation, steps)


def failure(trained: train.Trained, *, label: str) -> str:
    """One line about a training whose numbers stopped being finite; else nothing.

    Args:
        trained: the result.
        label: what was trained.
    """
    loss = trained.history["loss"]
    if trained.steps == len(loss):
        return ""
    infinite = np.flatnonzero(~np.isfinite(loss))
    what = f"loss at step {infinite[0] + 1}" if infinite.size else "last parameters"
    return (
        f"{label} training failed: its {what} is no finite number. Kept are the"
        f" parameters after step {trained.steps}. Try a lower --learning-rate"
    )


def headline(plan: Plan) -> str:
    """One line about what will be trained.

    Args:
        plan: what to train, and how.
    """
    sizes = [len(split.labels) for split in plan.dataset[1:]]
    height, width, _ = plan.dataset.shape
    return (
        f"{plan.dataset.name}: images of {height} by {width}, {sizes[0]:,} to train,"
        f" {sizes[1]:,} to validate, {sizes[2]:,} to test; {plan.epochs} epochs of"
        f" {plan.steps_per_epoch} steps on {jax.default_backend()}"
    )


def summary(plan: Plan, sparse: train.Trained, *, dense: train.Trained | None) -> str:
    """The table of the parameters, the accuracy on the test images, the bytes.

    Args:
        plan: what was trained, and how.
        sparse: the result.
        dense: the result without pruning, if that was trained too.
    """
    leaves = jax.tree.leaves(sparse.params)
    whole = sum(leaf.size for leaf in leaves)
    kept = sum(int(np.count_nonzero(leaf)) for leaf in leaves)
    width = leaves[0].dtype.itemsize
    said = [str(report(sparse.params)), "", "test accuracy"]
    if dense:
        score = train.accuracy(plan.net, dense.params, plan.dataset.test)
        said.append(f"  dense   {score:7.2%}  the same network trained without pruning")
    score = train.accuracy(plan.net, sparse.params, plan.dataset.test)
    said.append(
        f"  sparse  {score:7.2%}  {kept:,} of {whole:,} parameters are not zero"
        f" ({1 - kept / whole:.2%} sparsity)"
    )
    said += [
        "bytes of the parameters",
        f"  dense   {whole * width:11,}  as in model.safetensors, zeros and all",
        f"  sparse  {kept * width + -(-whole // 8):11,}  if stored as non-zero entries"
        " and one bit for each place",
    ]
    return "\n".join(said)


def _shapes(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the parameters, by path."""
    make = functools.partial(plan.net.init, shape=plan.dataset.shape)
    return trees.by_path(jax.eval_shape(make, jax.random.key(0)))


def _orders(plan: Plan) -> Iterator[np.ndarray]:
    return train.shuffles(
        len(plan.dataset.train.labels),
        batch_size=plan.batch_size,
        epochs=plan.epochs,
        seed=plan.seed,
    )


def _is_finite(tree: PyTree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def _bar(plan: Plan, label: str) -> tqdm:
    return tqdm(
        total=plan.steps_per_epoch * plan.epochs,
        desc=label,
        postfix="compiling",  # until the first part is done
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {remaining}{postfix}",
        ncols=min(shutil.get_terminal_size().columns, 80) - 1,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file is not flooded
    )


def _words(log: train.History) -> str:
    """What the bar says about the last part."""
    said = [f"loss {log['loss'].mean():.3g}", f"accuracy {log['accuracy'].mean():.0%}"]
    if "clipped_share" in log:
        said.append(f"clipped {log['clipped_share'][-1]:.0%}")
    if "sparsity" in log:
        said.append(f"sparsity {log['sparsity'][-1]:.1%}")
    return ", ".join(said)

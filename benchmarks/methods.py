"""Every way to train a sparse network, at four sparsities, beside the dense training.

Three networks of a size that a laptop trains: an MLP and a CNN on MNIST, a character
transformer on tiny-shakespeare.  Optimizer, steps, batches and, where a method prunes
gradually, the cubic ramp are the same for all; what is left of a method's settings is
as published, and kernels alone are made sparse.  Sparsity is a traced value, so a
method is compiled once for a network.  Layers share the zeros by magnitudes over the
root of their norm, but for methods that are published with a way of their own: global,
or, from the start, Erdős–Rényi.  Rewinding shares the same steps among four
rounds, each with a whole schedule of the rate, and so trains each for a quarter.  SNIP
and GraSP look at four batches.

Methods that take no target (penalties, gates, soft thresholds) are trained with several
strengths, and N of M with the nearest M that divides an axis: `methods_report.py` makes
a table of it all, and a plot.
"""

import argparse
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import clipjax
from clipjax import allocations, contrib, latents as forms, patterns, prox, scores
from clipjax.contrib import gates
from clipjax.examples import data, linen_nets

from . import training

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
EVERY = 50  # steps between two masks
SHARED = allocations.normalized(0.5)  # how layers share the zeros, if nothing is said

N_OF_M = "N of M, SR-STE"
GATES = "hard-concrete gates"
RDA_RATE = 1.0  # η of dual averaging, as SGD has its rate

Method = Callable[[optax.GradientTransformation, jax.Array, int], object]


def targeted() -> dict[str, Method]:
    """Returns what takes a sparsity: `(optimizer, sparsity, steps) -> tx`."""
    return gradual() | others()


def gradual() -> dict[str, Method]:
    """Returns what prunes a dense network while it trains."""
    return {
        "gradual magnitude": _gradual(SHARED),
        "gradual magnitude, uniform": _gradual(allocations.uniform),
        "gradual magnitude, global": _gradual(allocations.global_),
        "gradual magnitude, LAMP": _gradual(allocations.lamp()),
        "gradual saliency": _around(clipjax.sparse, score=scores.saliency),
        "gradual Fisher": _around(clipjax.sparse, score=scores.Fisher()),
        "AC/DC": lambda inner, sparsity, steps: optax.chain(
            inner,
            clipjax.sparsify(
                contrib.cyclic_schedule(sparsity, steps),
                allocation=allocations.global_,
                every=5,
            ),
        ),
        "straight-through": _latent(forms.straight_through()),
        "SR-STE": _latent(forms.sr_ste()),
        "Top-KAST": lambda inner, sparsity, steps: clipjax.latent(
            inner,
            sparsity,
            reparametrization=forms.top_kast(jnp.maximum(2 * sparsity - 1, 0)),
            allocation=SHARED,
            every=EVERY,
        ),
        "network surgery": _latent(forms.surgery()),
        "power propagation": _latent(forms.power_propagation()),
    }


def others() -> dict[str, Method]:
    """Returns what is sparse from the start, or is pruned in one or a few steps."""
    return {
        "static random": lambda inner, sparsity, steps: clipjax.static_sparse(
            inner, sparsity, key=_key()
        ),
        "SET": lambda inner, sparsity, steps: contrib.sparse_evolutionary(
            inner, sparsity, key=_key(), every=EVERY
        ),
        "RigL": lambda inner, sparsity, steps: clipjax.rigl(
            inner, sparsity, key=_key(), total_steps=steps, every=EVERY
        ),
        "SNFS": lambda inner, sparsity, steps: contrib.sparse_momentum(
            inner, sparsity, key=_key(), total_steps=steps, every=EVERY
        ),
        "rewinding": _rewinding,
        "SNIP": _kept,
        "GraSP": _kept,
        N_OF_M: _one_of_m,
    }


def swept() -> dict[str, tuple[Callable, tuple[float, ...]]]:
    """Returns methods without a target: `(optimizer, rate, strength) -> tx`, strengths.

    The same strengths for all three networks: chosen so that zeros come near the four
    sparsities in most of them.
    """

    def rising(least, number=7):
        return tuple(least * 1.6**power for power in range(number))

    def penalty(make, strengths):
        def chained(optimizer, rate, strength):
            return optax.chain(optimizer(rate), clipjax.proximal(make(strength), rate))

        return chained, strengths

    return {
        "L1": penalty(prox.L1, rising(0.1)),
        "MCP": penalty(prox.MCP, rising(0.1)),
        "SCAD": penalty(prox.SCAD, rising(0.1)),
        "L0": penalty(prox.L0, rising(0.3, 10)),
        "dual averaging": (_averaged, rising(5e-4)),
        "soft thresholds": (_soft, tuple(0.5 * 1.35**power for power in range(8))),
        GATES: (_gated, tuple(2.0**power for power in range(3, 9))),
    }


def _averaged(optimizer, rate, strength):
    del optimizer, rate  # it is one itself
    return contrib.regularized_dual_averaging(RDA_RATE, strength)


def _gated(optimizer, rate, strength):
    """Moves gates ten times as fast as weights, or they would not close in time."""
    del strength  # is in the loss
    own = {
        "weights": optimizer(rate),
        "gates": optax.adam(lambda step: 10 * rate(step)),
    }
    return optax.partition(own, ("weights", "gates"))


def _soft(optimizer, rate, strength):
    return clipjax.latent(
        optimizer(rate, weight_decay=strength),
        None,
        reparametrization=forms.soft_threshold(-10.0),
    )


def _one_of_m(inner, sparsity, steps):
    """Keeps one of every M neighbors along the longest axis, as SR-STE does."""

    def pattern(path, leaf):
        del path
        axis = max(range(leaf.ndim), key=lambda i: leaf.shape[i])
        sizes = [m for m in range(1, 100) if leaf.shape[axis] % m == 0]
        nearest = min(sizes, key=lambda m: abs(math.log(m * (1 - sparsity))))
        return patterns.NofM(1, nearest, axis=axis)

    del steps
    return clipjax.latent(
        inner,
        sparsity,
        reparametrization=forms.sr_ste(),
        pattern=pattern,
        every=EVERY,
    )


STARTS = {"SNIP": scores.snip, "GraSP": scores.grasp}  # prune before the training
ROUNDS = {"rewinding": 4}  # of training, where there is more than one


def _kept(inner, sparsity, steps):
    del sparsity, steps  # it is pruned when the training starts
    return optax.chain(inner, clipjax.constraints.keep_zeros())


def _rewinding(inner, sparsity, steps):
    rounds = ROUNDS["rewinding"] - 1
    return contrib.rewinding(
        inner,
        every=steps // (rounds + 1),
        rounds=rounds,
        rate=1 - (1 - sparsity) ** (1 / rounds),
        rewind_step=steps // 50,
    )


def _key():
    return jax.random.key(0)


def ramp(sparsity, steps):
    """Returns the cubic rise of the sparsity from a tenth to 65 % of the training."""
    first, last = steps // 10, steps * 65 // 100
    return optax.polynomial_schedule(
        0.0, sparsity, power=3, transition_steps=last - first, transition_begin=first
    )


def _gradual(allocation):
    return lambda inner, sparsity, steps: optax.chain(
        inner,
        clipjax.sparsify(ramp(sparsity, steps), allocation=allocation, every=EVERY),
    )


def _around(wrap, **options):
    return lambda inner, sparsity, steps: wrap(
        inner, ramp(sparsity, steps), allocation=SHARED, every=EVERY, **options
    )


def _latent(form):
    return _around(clipjax.latent, reparametrization=form)


def workloads(folder):
    """Returns the networks, their data and optimizers by name."""
    digits = functools.partial(
        training.digits_workload, data.idx_folder(folder / "mnist")
    )
    text = training.text_workload(
        folder / "tinyshakespeare" / "input.txt", training.Characters(False)
    )
    cnn = linen_nets.CNN((16, 32), 64, kernel=3, padding="SAME")
    return {
        "MLP": digits(linen_nets.MLP())(optax.adamw, 2e-3, steps=2000),
        "CNN": digits(cnn)(optax.adamw, 2e-3, steps=1000),
        "transformer": text(optax.adamw, 3e-3, steps=600),
    }


def trainer(work, make, *, start=None, rounds=1, gated=False):
    """Compiles `(seed, knob) -> error or loss, sparsity of kernels`.

    The error on held-out images in per cent, or the loss on held-out text.

    Args:
        work: what to train.
        make: `(optimizer, rate, knob) -> tx`; the knob, a sparsity or a strength, is
            traced unless it is static.
        start: prunes before the training, by these scores.
        rounds: of training, each with a whole schedule of the rate.
        gated: whether kernels have gates, and the knob is the price of an open one.
    """
    span = work.steps // rounds
    rate = optax.warmup_cosine_decay_schedule(0, work.rate, span // 50, span)

    def loss(params, batch, temperature=1.0):
        logits = work.net.apply({"params": params}, batch[0]) / temperature
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses.mean(), 100 * (logits.argmax(-1) != batch[1]).mean()

    def gated_loss(params, batch, knob, key):
        weights, levels = params
        open_ones = sum(map(gates.expected_l0, levels.values()))
        size = sum(level.size for level in levels.values())
        price = knob * open_ones / size
        return loss(_through(weights, levels, key), batch)[0] + price

    def run(seed, knob, data):
        tx = make(work.optimizer, rate, knob)
        keys = jax.random.split(jax.random.key(seed), 1 + work.steps)
        held_out = work.batch(None, data)
        params = work.net.init(keys[0], held_out[0][:1])["params"]
        if start is not None:
            batches = jax.vmap(work.batch, (0, None))(
                jax.random.split(keys[0], 4), data
            )
            batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
            scored = start(lambda *args: loss(*args)[0], params, batch)
            params = clipjax.prune(
                params, knob, score=scored, allocation=allocations.global_
            )
        if gated:
            params = (
                params,
                {path: jnp.full_like(x, 2.0) for path, x in kernels(params).items()},
            )

        def step(carry, key):
            params, state = carry
            batch = work.batch(key, data)
            if gated:
                noise = jax.random.fold_in(key, 1)
                grads = jax.grad(gated_loss)(params, batch, knob, noise)
            else:
                grads, _ = jax.grad(loss, has_aux=True)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (trained, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys[1:])
        trained = _through(*trained) if gated else trained
        final, wrong = loss(trained, held_out)
        is_text = isinstance(work.net, training.Characters)
        return final if is_text else wrong, _zeros(trained)

    compiled = jax.jit(run).lower(0, jnp.float32(0), work.data).compile()
    return lambda seed, knob: compiled(seed, jnp.float32(knob), work.data)


def _through(weights, levels, key=None):
    """Multiplies kernels by their gates, drawn with a key, or those of the end."""
    numbers = {path: i for i, path in enumerate(levels)}

    def one(path, leaf):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        if path not in levels:
            return leaf
        if key is None:
            return leaf * gates.evaluate(levels[path])
        own = jax.random.fold_in(key, numbers[path])
        return leaf * gates.sample(own, levels[path])

    return jax.tree_util.tree_map_with_path(one, weights)


def kernels(params):
    """Returns by path what is made sparse."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    return {p: x for p, x in leaves.items() if clipjax.masks.weights(p, x)}


def _zeros(params):
    leaves = kernels(params).values()
    return sum(jnp.sum(x == 0) for x in leaves) / sum(x.size for x in leaves)


def runs(work):
    """Yields of every method its name, its knobs and what compiles `run(seed, knob)`.

    That takes a knob, which matters where it is no traced value.
    """

    def dense(optimizer, rate, knob):
        del knob
        return optimizer(rate)

    def aimed(method):
        return lambda optimizer, rate, knob: method(optimizer(rate), knob, work.steps)

    yield "dense", (0.0,), _once(trainer, work, dense)
    for name, method in targeted().items():
        if name == N_OF_M:
            yield name, SPARSITIES, functools.partial(_anew, work, method)
            continue
        options = {"start": STARTS.get(name), "rounds": ROUNDS.get(name, 1)}
        yield name, SPARSITIES, _once(trainer, work, aimed(method), **options)
    for name, (make, strengths) in swept().items():
        yield name, strengths, _once(trainer, work, make, gated=name == GATES)


def _once(make, *args, **options):
    """Compiles for all knobs together."""
    made = functools.cache(functools.partial(make, *args, **options))
    return lambda knob: made()


def _anew(work, method, sparsity):
    """Compiles for one sparsity."""

    def make(optimizer, rate, knob):
        del knob
        return method(optimizer(rate), sparsity, work.steps)

    return trainer(work, make)


def measure(results, work, *, seeds, only, save):
    """Fills in what `results`, runs by method and knob, does not hold yet.

    Before every method a dense network is trained for its time: how fast the machine is
    changes within the hours that all this takes.
    """
    makers = {name: (knobs, make) for name, knobs, make in runs(work)}
    for name, (knobs, make) in makers.items():
        if only and name not in only:
            continue
        row = results.setdefault(name, {})
        if all(len(row.get(str(knob), [])) >= seeds for knob in knobs):
            continue
        _, dense = _timed(makers["dense"][1](0.0), 0, 0.0)
        for knob in knobs:
            done = row.setdefault(str(knob), [])
            while len(done) < seeds:
                (score, zeros), seconds = _timed(make(knob), len(done), knob)
                found = {"score": score, "zeros": zeros}
                done.append(found | {"seconds": seconds, "dense": dense})
                save()
        print(name, row, flush=True)


def _timed(run, *args):
    start = time.perf_counter()
    results = tuple(map(float, run(*args)))
    return results, time.perf_counter() - start


def main():
    """Trains what is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a JSON file")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="networks whose names hold this")
    names = ["dense", *targeted(), *swept()]
    parser.add_argument("--methods", nargs="*", choices=names, help="all, if left out")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}

    def save():
        options.out.write_text(json.dumps(results, indent=1) + "\n")

    for name, work in workloads(options.data).items():
        if options.only in name:
            measure(
                results.setdefault(name, {}),
                work,
                seeds=options.seeds,
                only=options.methods,
                save=save,
            )


if __name__ == "__main__":
    main()

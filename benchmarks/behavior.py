"""What each clip does to norms that spike, rise, fall and drift.

Each method runs as it is, one compiled scan over simulated norms: lognormal, σ = 0.1,
level 1, without parameters. `adaptive_clip`, which alone reads them, runs with those of
norm 1, 100 and 10⁴ too, and the worst counts. `python -m benchmarks.behavior` prints
the table.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipjax
from clipjax import contrib, thresholds

WARM = 300  # steps before anything happens
SEEDS = 5
PARAM_NORMS = (1.0, 1e2, 1e4, None)
METHODS = {
    "adaptive_clip()": clipjax.adaptive_clip(),
    "clip_by_global_norm(1)": clipjax.clip_by_global_norm(1.0),
    "autoclip(window=1000)": contrib.autoclip(window=1000),
    "autoclip(0.9, window=100)": contrib.autoclip(0.9, window=100),
    "clip_by_percentile()": contrib.clip_by_percentile(),
    "quantile_clip()": contrib.quantile_clip(),
    "quantile_clip(0.9)": contrib.quantile_clip(0.9),
    "zclip()": contrib.zclip(),
    "zclip(target=at_mean)": contrib.zclip(target=thresholds.at_mean),
    "zclip(target=at_limit)": contrib.zclip(
        target=thresholds.at_limit, max_norm=np.inf
    ),
    "zclip(skip=True)": contrib.zclip(skip=True),
    "adagc()": contrib.adagc(max_norm=np.inf),
    "aggc(...)": contrib.aggc(lambda path, leaf: path),
    "clip_by_moving_sigma()": contrib.clip_by_moving_sigma(),
    "spam_clip()": contrib.spam_clip(),
    "stable_spam_clip()": contrib.stable_spam_clip(),
    "gradient_stabilizer()": contrib.gradient_stabilizer(),
}
COLUMNS = {  # what is asked of `adaptive_clip`
    "ordinary steps touched": "≤ 5 %",
    "a 1000x spike": "≤ 1.3",
    "a 10x spike 20 steps later": "≤ 1.3",
    "five 100x spikes": "≤ 1.5",
    "a 100x spike in the first five": "≤ 1.5",
    "steps until 3x passes": "≤ 10",
    "until 10x passes": "≤ 30",
    "10x spike after a fall to 0.3": "≤ 1.3",
    "touched, drift up": "≤ 15 %",
    "touched, drift down": "≤ 15 %",
    "touched, Student-t": "≤ 10 %",
    "a NaN comes out as": "0",
    "and moves later norms by": "0.0 %",
}


def level(rng, steps, value=1.0):
    """Returns ordinary norms about a level, or about one for each step."""
    return value * np.exp(0.1 * rng.standard_normal(steps))


def scenarios(seed):
    """Returns by name the norms that come in."""
    rng = np.random.default_rng(seed)
    before = level(rng, WARM)
    drift = 10.0 ** (np.arange(1000) / 1000)
    after = level(np.random.default_rng(SEEDS + seed), 100)

    def then(*norms):
        return np.concatenate([before, *norms])

    return {
        "ordinary": then(level(rng, 3000)),
        "one": then([1e3], level(rng, 19), [10.0]),
        "five": then([100.0] * 5),
        "3x": then(level(rng, 2000, 3.0)),
        "10x": then(level(rng, 2000, 10.0)),
        "fall": then(level(rng, WARM, 0.3), [3.0]),
        "up": then(level(rng, 1000, drift)),
        "down": then(level(rng, 1000, 1 / drift)),
        "student": np.abs(1 + 0.1 * rng.standard_t(3, WARM + 3000)),
        "whole": then(after),
        "nan": then([np.nan], after),
        **{f"early {n}": np.append(level(rng, n), 100.0) for n in range(5)},
    }


def simulated(tx, sequences, param_norm):
    """Returns what comes out of each sequence of norms."""
    params = {"w": jnp.zeros(4).at[0].set(param_norm or 0)}
    given = None if param_norm is None else params
    length = max(map(len, sequences))
    padded = np.ones((len(sequences), length), np.float32)
    for row, norms in zip(padded, sequences, strict=True):
        row[: len(norms)] = norms

    @jax.jit
    @jax.vmap
    def run(norms):
        def step(state, norm):
            updates, state = tx.update({"w": params["w"] * 0 + norm / 2}, state, given)
            return state, optax.tree.norm(updates)

        return jax.lax.scan(step, tx.init(params), norms)[1]

    out = np.asarray(run(jnp.asarray(padded)))
    return [row[: len(norms)] for row, norms in zip(out, sequences, strict=True)]


def figures(tx, param_norm):
    """Returns a method's figures: shares and times are means, norms the worst."""
    come = [scenarios(seed) for seed in range(SEEDS)]
    names = list(come[0])
    went = [{} for _ in come]
    keys = [(i, name) for i in range(SEEDS) for name in names]
    out = simulated(tx, [come[i][name] for i, name in keys], param_norm)
    for (i, name), norms in zip(keys, out, strict=True):
        went[i][name] = norms

    def touched(name):
        shares = [
            np.mean(np.abs(o[name][WARM:] / i[name][WARM:] - 1) > 1e-5)
            for i, o in zip(come, went, strict=True)
        ]
        return np.mean(shares)

    def until(name):
        times = []
        for i, o in zip(come, went, strict=True):
            passed = o[name][WARM:] / i[name][WARM:]
            means = np.convolve(passed, np.ones(50) / 50, "valid")
            fits = np.flatnonzero(means >= 0.9)
            times.append(fits[0] if len(fits) else np.inf)
        return np.mean(times)

    return [
        touched("ordinary"),
        max(o["one"][WARM] for o in went),
        max(o["one"][-1] for o in went),
        max(o["five"][WARM:].max() for o in went),
        max(o[name][-1] for o in went for name in names if name.startswith("early")),
        until("3x"),
        until("10x"),
        max(o["fall"][-1] / 0.3 for o in went),
        touched("up"),
        touched("down"),
        touched("student"),
        max(o["nan"][WARM] for o in went),
        max(moved(o["nan"][WARM + 1 :], o["whole"][WARM:]) for o in went),
    ]


def moved(norms, without):
    """Returns the largest relative difference: infinite if norms are not numbers."""
    change = np.abs(norms - without) / np.maximum(np.abs(without), 1e-9)
    return np.nan_to_num(np.max(change), nan=np.inf)


def text(column, value):
    """Spells a figure."""
    if np.isnan(value):
        return "NaN"
    if "moves" in column and np.isinf(value):
        return "NaN for ever"
    if "touched" in column or "moves" in column:
        return f"{100 * value:.1f} %"
    if "until" in column:
        return "never" if np.isinf(value) else f"{value:.0f}"
    return f"{value:.3g}"


def table():
    """Returns the table as Markdown."""
    lines = [
        "| method | " + " | ".join(COLUMNS) + " |",
        "| --- |" + " --: |" * len(COLUMNS),
        "| asked of `adaptive_clip()` | " + " | ".join(COLUMNS.values()) + " |",
    ]
    for name in METHODS:
        param_norms = PARAM_NORMS if name == "adaptive_clip()" else [None]
        each = [figures(METHODS[name], norm) for norm in param_norms]
        values = np.max(each, axis=0)
        cells = [text(c, v) for c, v in zip(COLUMNS, values, strict=True)]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

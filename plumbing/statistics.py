"""Statistics over prompts, which the papers leave out.  None and NaN are missing, not 0 or ties."""

import math

import numpy as np


def estimate(values, least=-math.inf) -> dict:
    """Mean, 95% interval (all >= least), standard error, n: [1, 0, None] -> .5, 0, 1, .5, 2."""
    v = np.array(values, float)
    interval, v = bootstrap_interval(v), v[~np.isnan(v)]
    error = float(v.std(ddof=1)) / math.sqrt(len(v)) if len(v) > 1 else math.nan
    found = np.maximum([v.mean() if len(v) else math.nan, *interval], least).tolist()
    return dict(zip(("score", "low", "high"), found)) | {"standard_error": error, "n": len(v)}


def win_rate(preferences) -> dict:
    """`estimate` of preferences in [0, 1] (mean: (wins + ties/2) / n for 1, .5, 0), and counts.
    [1, 1, .5, 0, None] -> win_rate .625, standard_error .2394, n 4, wins 2, ties 1, losses 1."""
    p, found = np.array(preferences, float), estimate(preferences)
    counts = {"wins": p > 0.5, "ties": p == 0.5, "losses": p < 0.5, "missing": np.isnan(p)}
    return {"win_rate": found.pop("score"), **found, **{k: int(v.sum()) for k, v in counts.items()}}


def bootstrap_interval(values, *, level=0.95, samples=10_000, seed=0) -> tuple[float, float]:
    """Percentile bootstrap of the mean of values [n], one per prompt; missing ones are drawn too,
    so that comparisons over the same prompts stay paired.  [1, None] -> (1, 1); nothing -> NaN."""
    drawn = np.random.default_rng(seed).choice(np.array(values, float), (samples, len(values)))
    n = (~np.isnan(drawn)).sum(1)  # [samples]
    means, ends = np.nansum(drawn, 1)[n > 0] / n[n > 0], [(1 - level) / 2, (1 + level) / 2]
    return tuple(np.quantile(means, ends).tolist()) if len(means) else (math.nan, math.nan)


def sign_permutation(differences, *, samples=10_000, seed=0) -> float:
    """Two-sided p-value for mean 0: the share of sign patterns s with |sum s_i d_i| >= |sum d_i|,
    over all patterns or, if there are more than `samples`, over that many random ones and d's own.
    [.5, .5, .5, -.5, 0, None] -> 10/16; nothing -> NaN."""
    d, rng = np.array(differences, float), np.random.default_rng(seed)
    nothing, d = np.isnan(d).all(), d[np.abs(d) > 0]
    flips = (np.arange(min(2 ** len(d), samples + 1))[:, None] >> np.arange(len(d))) & 1
    if len(flips) > samples:
        flips[1:] = rng.integers(2, size=(samples, len(d)))
    least = abs(d.sum()) - 1e-6 * np.abs(d).sum()  # float32's rounding must not split true ties
    return math.nan if nothing else float((np.abs(d.sum() - 2 * (flips @ d)) >= least).mean())


def agreement(a, b) -> dict:
    """Two judges' preferences [n]: share of equal labels (win, tie, loss), and Cohen's kappa.
    [1, .9, 0, .5, 1, None], [.8, .6, .3, 1, 0, 1] -> n 5, agreement .6, kappa .2857."""
    signs = np.sign(np.array([a, b], float) - 0.5)
    x, y = signs[:, ~np.isnan(signs).any(0)].tolist()
    equal, chance = sum(i == j for i, j in zip(x, y)), sum(x.count(s) * y.count(s) for s in {*x})
    kappa = (len(x) * equal - chance) / (len(x) ** 2 - chance) if len(x) ** 2 > chance else math.nan
    return {"n": len(x), "agreement": equal / len(x) if len(x) else math.nan, "kappa": kappa}

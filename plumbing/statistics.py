"""Statistics over prompts, which the papers leave out.  None and NaN are missing: no 0, no tie."""

import math
from collections import Counter

import numpy as np


def floats(values, low=-1e100, high=1e100):
    """[n] numbers or None -> [n] float64, NaN = missing.  ValueError: outside [low, high]."""
    out = np.array([math.nan if v is None else v for v in values], dtype=float)
    if out.ndim != 1 or ((out < low) | (out > high)).any():
        raise ValueError(f"expected a flat list of numbers in [{low}, {high}] or None")
    return out


def mean_error(values) -> tuple:
    """Mean, its standard error, and of how many.  [1, 0, None] -> .5, .5, 2; NaN without any."""
    v = [v for v in floats(values).tolist() if v == v]
    mean = math.fsum(v) / len(v) if v else math.nan
    squares = math.fsum((x - mean) ** 2 for x in v)
    return mean, math.sqrt(squares / (len(v) - 1) / len(v)) if len(v) > 1 else math.nan, len(v)


def win_rate(preferences) -> dict:
    """(wins + ties/2) / n, or the mean of continuous preferences in [0, 1], n of them and missing.
    [1, 1, .5, 0, None] -> win_rate .625, standard_error .2394, n 4, wins 2, ties 1, losses 1."""
    p = floats(preferences, 0, 1)
    mean, error, n = mean_error(p)
    wins, ties, losses = (int(of.sum()) for of in (p > 0.5, p == 0.5, p < 0.5))
    return {"win_rate": mean, "standard_error": error, "n": n, "wins": wins, "ties": ties,
            "losses": losses, "missing": len(p) - n}


def draws(high: int, samples: int, n: int, seed: int):
    """[samples, n] random integers below `high`, some rows at a time to spare memory."""
    rng = np.random.default_rng(seed)
    return (rng.integers(high, size=(min(256, samples - k), n)) for k in range(0, samples, 256))


def bootstrap_interval(values, *, level=0.95, samples=10_000, seed=0) -> tuple[float, float]:
    """Percentile bootstrap of the mean of values [n], one per prompt; missing ones are drawn too,
    so that comparisons over the same prompts are paired.  [1, None] -> (1, 1); nothing -> NaN."""
    v = floats(values)
    drawn = (v[rows] for rows in draws(max(1, len(v)), samples, len(v), seed))
    means = np.concatenate([np.nanmean(d[~np.isnan(d).all(1)], 1) for d in drawn])
    ends = [(1 - level) / 2, (1 + level) / 2]
    return tuple(np.quantile(means, ends).tolist()) if means.size else (math.nan, math.nan)


def sign_permutation(differences, *, samples=10_000, seed=0) -> float:
    """Two-sided p of the sign-flip test of mean 0: P(|sum_i s_i d_i| >= |sum_i d_i|), s_i = +-1,
    exact if there are at most `samples` sign patterns, else (1 + hits) / (1 + samples).
    [.5, .5, .5, -.5, 0, None] -> 10/16; NaN if none is present."""
    d = floats(differences)
    if np.isnan(d).all():
        return math.nan
    d = d[~np.isnan(d) & (d != 0)]
    k, exact = len(d), 2 ** len(d) <= samples
    flips = [np.arange(2**k)[:, None] >> np.arange(k) & 1] if exact else draws(2, samples, k, seed)
    least = abs(d.sum()) - 1e-10 * np.abs(d).sum()  # rounding must not split true ties
    hits = sum(int((np.abs(d.sum() - 2 * (flip @ d)) >= least).sum()) for flip in flips)
    return hits / 2**k if exact else (1 + hits) / (1 + samples)


def cohen_kappa(a, b) -> float:
    """(p_o - p_e) / (1 - p_e), agreement beyond chance of labels a, b [n], None = missing; NaN if
    p_e = 1.  20 pairs yy, 5 yn, 10 ny, 15 nn: p_o .7, p_e .5 -> .4."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if None not in (x, y) and x == x and y == y]
    n, in_a, in_b = len(pairs), Counter(x for x, _ in pairs), Counter(y for _, y in pairs)
    equal, chance = sum(x == y for x, y in pairs), sum(in_a[x] * in_b[x] for x in in_a)
    return float((n * equal - chance) / (n * n - chance)) if n * n > chance else math.nan


def agreement(a, b) -> dict:
    """Two judges on the same prompts, preferences [n]: share of equal labels (win, tie, loss) and
    their kappa, over all that both judged, and over what neither calls a tie (`decided`).
    [1, .9, 0, .5, 1, None], [.8, .6, .3, 1, 0, 1] -> n 5, agreement .6, kappa .2857, decided 4."""
    signs = np.sign(np.stack([floats(a, 0, 1), floats(b, 0, 1)], 1) - 0.5)
    both, out = signs[~np.isnan(signs).any(1)], {}
    for prefix, kept in (("", both), ("decided_", both[both.all(1)])):
        x, y = kept.T.tolist()
        out |= {prefix.rstrip("_") or "n": len(x), prefix + "agreement": mean_error(
            kept[:, 0] == kept[:, 1])[0], prefix + "kappa": cohen_kappa(x, y)}
    return out


def length_controlled_win_rate(preferences, lengths, other_lengths) -> float:
    """Expected preference at equal lengths: sigmoid(w_0) of the logistic regression preference ~
    sigmoid(w_0 + w_1 z), z = difference / std; ridge 1e-6/2 |w|^2 keeps separable data finite.
    (AlpacaEval's has tanh(z) and terms for difficulty, fitted over many models: another number.)
    [1, 1, 1, 0, 1, 0], differences +10 four times, -10 twice: sigmoid(ln(3)/2) = .634."""
    table = np.stack([floats(preferences, 0, 1), floats(lengths), floats(other_lengths)])
    p, ours, theirs = table[:, ~np.isnan(table).any(0)]
    if not p.size:
        return math.nan
    d = (ours - theirs) / (np.abs(ours - theirs).max() or 1)
    z = d / d.std() if d.std() > 1e-9 else 0 * d
    x, w = np.stack([np.ones_like(z), z], 1), np.zeros(2)
    for _ in range(10_000):  # damped Newton: a full step can diverge on separable data
        s, t = np.exp(-np.logaddexp(0, [-(x @ w), x @ w]))  # sigmoid, 1 - sigmoid
        hessian = (x.T * (s * t)) @ x / len(p) + 1e-6 * np.eye(2)
        step = np.linalg.solve(hessian, x.T @ (p * t - (1 - p) * s) / len(p) - 1e-6 * w)
        move = np.abs(x @ step).max()  # largest change of a logit
        if move < 1e-8:
            break
        w = w + step * math.log1p(move) / move
    return float(np.exp(-np.logaddexp(0, -w[0])))


def estimate(values: list) -> dict:
    """Mean, standard error and 95% interval of one number per prompt, None where it is missing."""
    mean, error, n = mean_error(values)
    interval = list(bootstrap_interval(values))
    return {"score": mean, "standard_error": error, "interval": interval, "n": n}

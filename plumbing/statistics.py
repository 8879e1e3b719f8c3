"""Statistics over prompts, which the papers leave out.  None and NaN are missing: never 0 or a tie."""

import math
from collections import Counter

import numpy as np


def floats(values, low=-1e100, high=1e100):
    """[n] numbers or None -> [n] float64, NaN = missing.  ValueError: outside [low, high]."""
    out = np.array([math.nan if v is None else v for v in values], dtype=float)
    if out.ndim != 1 or ((out < low) | (out > high)).any():
        raise ValueError(f"expected a flat list of numbers in [{low}, {high}] or None")
    return out


def win_rate(preferences) -> dict:
    """(wins + ties/2) / n, or the mean of continuous preferences in [0, 1], n of them and missing.
    [1, 1, .5, 0, None] -> win_rate .625, standard_error .2394, n 4, wins 2, ties 1, losses 1."""
    p = floats(preferences, 0, 1)
    seen = p[~np.isnan(p)]
    n, wins, ties = len(seen), int((seen > 0.5).sum()), int((seen == 0.5).sum())
    mean = math.fsum(seen) / n if n else math.nan
    error = math.sqrt(math.fsum((seen - mean) ** 2) / (n - 1) / n) if n > 1 else math.nan
    return {"win_rate": mean, "standard_error": error, "n": n, "wins": wins, "ties": ties,
            "losses": n - wins - ties, "missing": len(p) - n}


def bootstrap_interval(values, *, level=0.95, samples=10_000, seed=0) -> tuple[float, float]:
    """Percentile bootstrap of the mean of values [n], one per prompt; missing ones are drawn too, so
    that comparisons over the same prompts are paired.  [1, None] -> (1, 1); nothing -> NaN."""
    v = floats(values)
    if np.isnan(v).all():
        return math.nan, math.nan
    drawn = v[np.random.default_rng(seed).integers(len(v), size=(samples, len(v)))]
    means = np.nanmean(drawn[~np.isnan(drawn).all(1)], 1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_permutation(differences, *, samples=10_000, seed=0) -> float:
    """Two-sided p of the sign-flip test of mean 0: P(|sum_i s_i d_i| >= |sum_i d_i|), s_i = +-1, exact
    if there are at most `samples` sign patterns, else (1 + hits) / (1 + samples).
    [.5, .5, .5, -.5, 0, None] -> 10/16; NaN if none is present."""
    d = floats(differences)
    if np.isnan(d).all():
        return math.nan
    d = d[~np.isnan(d) & (d != 0)]
    k, exact = len(d), 2 ** len(d) <= samples
    flip = np.arange(2**k)[:, None] >> np.arange(k) & 1 if exact else np.random.default_rng(
        seed).integers(2, size=(samples, k))
    least = abs(d.sum()) - 1e-10 * np.abs(d).sum()  # rounding must not split true ties
    hits = (np.abs(d.sum() - 2 * (flip @ d)) >= least).sum()
    return float(hits / 2**k if exact else (1 + hits) / (1 + samples))


def cohen_kappa(a, b) -> float:
    """(p_o - p_e) / (1 - p_e), agreement beyond chance of labels a, b [n], None = missing; NaN if
    p_e = 1.  20 pairs yy, 5 yn, 10 ny, 15 nn: p_o .7, p_e .5 -> .4."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    n, in_a, in_b = len(pairs), Counter(x for x, _ in pairs), Counter(y for _, y in pairs)
    equal, chance = sum(x == y for x, y in pairs), sum(in_a[x] * in_b[x] for x in in_a)
    return (n * equal - chance) / (n * n - chance) if n * n > chance else math.nan


def agreement(a, b) -> dict:
    """Two judges on the same prompts, preferences [n]: share of equal labels (win, tie, loss) and
    their kappa, over all that both judged, and over what neither calls a tie (`decided`).
    [1, .9, 0, .5, 1, None], [.8, .6, .3, 1, 0, 1] -> n 5, agreement .6, kappa .2857, decided 4."""
    signs = [np.sign(floats(x, 0, 1) - 0.5) for x in (a, b)]
    pairs = [p for p in zip(*signs, strict=True) if not np.isnan(p).any()]
    out = {}
    for n, prefix in (("n", ""), ("decided", "decided_")):
        kept = [p for p in pairs if all(p) or not prefix]
        share = sum(x == y for x, y in kept) / len(kept) if kept else math.nan
        kappa = cohen_kappa([x for x, _ in kept], [y for _, y in kept])
        out |= {n: len(kept), prefix + "agreement": share, prefix + "kappa": kappa}
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
    v = floats(values)
    v, interval = v[~np.isnan(v)], list(bootstrap_interval(values))
    error = float(v.std(ddof=1) / len(v) ** 0.5) if len(v) > 1 else math.nan
    mean = float(v.mean()) if len(v) else math.nan
    return {"score": mean, "standard_error": error, "interval": interval, "n": len(v)}

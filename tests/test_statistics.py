"""The statistics of evaluate.py: exact fractions, slow loops, full enumeration and gradients as oracles. Every numpy warning is an error."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import hypothesis
from hypothesis import example, settings
from hypothesis import strategies as st

from facts.premise import logistic
from plumbing.statistics import agreement, bootstrap_interval, estimate, sign_permutation, win_rate

pytestmark = pytest.mark.filterwarnings("error")

NAN = math.nan


def given(*strategies):
    """Hypothesis with the same examples in every run."""
    return lambda test: settings(derandomize=True, database=None, deadline=None, max_examples=80)(hypothesis.given(*strategies)(test))


MISSING = st.sampled_from([None, NAN])
PREFERENCES = st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0, 0.5, 1, True, False]), MISSING), max_size=30)
COARSE = st.lists(st.one_of(st.sampled_from([0, 0.2, 0.5, 0.7, 1]), MISSING), max_size=12)
NOTHING = [[], [None], [NAN], [None, NAN, None]]


def present(values):
    return [v for v in values if v is not None and not math.isnan(v)]


def same(x, y, tolerance=0.0):
    return (math.isnan(x) and math.isnan(y)) or abs(x - y) <= tolerance


# ---------------------------------------------------------------- win_rate


def test_win_rate_docstring_example():
    got = win_rate([1, 1, 0.5, 0, None])
    assert got.pop("standard_error") == pytest.approx(0.2394, abs=5e-5)
    low, high = bootstrap_interval([1, 1, 0.5, 0, None])
    assert got == dict(win_rate=0.625, low=low, high=high, n=4, wins=2, ties=1, losses=1, missing=1)


def test_estimate_and_its_limit():
    assert estimate([1, 0, None]) == dict(score=0.5, low=0, high=1, standard_error=0.5, n=2)
    assert estimate([-1, -1, 0.5], least=0) == estimate([-1, -1, 0.5]) | dict(score=0, low=0, high=0.5)  # the mean is clipped, not the values
    assert all(math.isnan(estimate([None], least=0)[name]) for name in ("score", "low", "high", "standard_error"))


@given(PREFERENCES)
@example([0.1] * 30)
@example([1.0, 5e-324])
def test_win_rate_is_exact_fraction_arithmetic(preferences):
    got, seen = win_rate(preferences), [Fraction(float(p)) for p in present(preferences)]
    n = len(seen)
    assert got["n"] == n and got["missing"] == len(preferences) - n
    half = Fraction(1, 2)
    assert (got["wins"], got["ties"], got["losses"]) == tuple(sum(c) for c in ([p > half for p in seen], [p == half for p in seen], [p < half for p in seen]))
    assert same(got["win_rate"], float(sum(seen) / n) if n else NAN, 1e-12)
    mean = sum(seen) / n if n else 0
    assert same(got["standard_error"], math.sqrt(sum((p - mean) ** 2 for p in seen) / (n - 1) / n) if n > 1 else NAN, 1e-12)


@given(st.lists(st.sampled_from([0, 0.5, 1, None]), min_size=1).filter(present))
def test_discrete_win_rate_is_wins_plus_half_the_ties(preferences):
    got = win_rate(preferences)
    assert got["win_rate"] == float(Fraction(2 * got["wins"] + got["ties"], 2 * got["n"]))


def test_win_rate_agrees_with_pandas():
    pandas = pytest.importorskip("pandas")
    preferences = np.random.default_rng(3).random(200).tolist() + [None, NAN]
    series, got = pandas.Series(preferences, dtype=float), win_rate(preferences)
    assert got["win_rate"] == pytest.approx(series.mean(), abs=1e-12) and got["standard_error"] == pytest.approx(series.sem(), abs=1e-12)


# ---------------------------------------------------------------- bootstrap_interval


def slow_means(values, samples, seed):
    """The means of the resamples, one by one; NaN where a resample holds nothing."""
    draws = np.random.default_rng(seed).integers(len(values), size=(samples, len(values)))
    kept = [present([values[i] for i in row]) for row in draws.tolist()]
    return np.array([sum(k) / len(k) if k else NAN for k in kept])


def slow_interval(means, level):
    """Percentiles with linear interpolation, by sorting."""
    ordered = sorted(present(means.tolist()))

    def at(q):
        place = q * (len(ordered) - 1)
        i = min(int(place), len(ordered) - 2) if len(ordered) > 1 else 0
        return ordered[i] + (place - i) * (ordered[min(i + 1, len(ordered) - 1)] - ordered[i])

    return at((1 - level) / 2), at((1 + level) / 2)


def test_bootstrap_docstring_examples():
    assert bootstrap_interval([0, 0, 1, 1]) == (0, 1)
    assert bootstrap_interval([1, None]) == (1, 1)


@pytest.mark.parametrize("level", [0.95, 0.5, 0.0, 1.0])
@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("values", [[0.25], [1, 0], [0.5, None, 1, 0, NAN, 0.1], [None, 3.0], list(np.random.default_rng(1).normal(size=37))])
def test_bootstrap_is_the_slow_loop(values, level, seed):
    want = slow_interval(slow_means(values, 300, seed), level)
    assert bootstrap_interval(values, level=level, samples=300, seed=seed) == pytest.approx(want, abs=1e-12)


def test_bootstrap_defaults_are_95_per_cent_10000_samples_seed_0():
    values = np.random.default_rng(2).random(9)
    assert bootstrap_interval(values) == bootstrap_interval(values, level=0.95, samples=10_000, seed=0)
    assert len({bootstrap_interval(values, **change) for change in ({}, dict(level=0.9), dict(samples=9_999), dict(seed=1))}) == 4


def test_bootstrap_is_near_the_normal_interval_for_many_prompts():
    values = np.random.default_rng(5).random(2000)
    error = values.std(ddof=1) / math.sqrt(len(values))
    low, high = bootstrap_interval(values, samples=4000)
    assert (low - values.mean()) / error == pytest.approx(-1.96, abs=0.1)
    assert (high - values.mean()) / error == pytest.approx(1.96, abs=0.1)


@pytest.mark.parametrize("hole", [False, True])
def test_bootstrap_of_a_difference_is_the_difference_of_bootstraps(hole):
    rng = np.random.default_rng(11)
    x, y = rng.random(60), rng.random(60)
    if hole:
        x[[3, 20]] = y[[3, 20]] = NAN
    means = slow_means(x.tolist(), 500, 4) - slow_means(y.tolist(), 500, 4)
    assert bootstrap_interval(x - y, samples=500, seed=4) == pytest.approx(slow_interval(means, 0.95), abs=1e-12)


@given(st.lists(st.one_of(st.floats(0, 1), st.none()), min_size=1, max_size=12).filter(present))
def test_bootstrap_of_the_swapped_models_is_mirrored(values):
    low, high = bootstrap_interval(values, samples=200)
    swapped = [None if v is None else 1 - v for v in values]
    assert bootstrap_interval(swapped, samples=200) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_level_above_one_is_refused():
    with pytest.raises(ValueError):
        bootstrap_interval([0, 1], level=95)


def test_bootstrap_without_any_usable_resample_is_nan():
    outcomes = {bootstrap_interval([1, None, None], samples=1, seed=seed)[0] == 1 for seed in range(20)}
    assert outcomes == {True, False}  # (2/3)^3 = 30 % of the single resamples hold nothing: NaN


# ---------------------------------------------------------------- sign_permutation


def enumerated(differences):
    """The p-value over all signs (zeros included), in fractions of the decimal values."""
    d = [Fraction(str(v)) for v in present(differences)]
    sums = [abs(sum(s * v for s, v in zip(signs, d))) for signs in itertools.product((1, -1), repeat=len(d))]
    return sum(s >= abs(sum(d)) for s in sums) / len(sums)


def test_sign_permutation_docstring_example():
    assert sign_permutation([0.5, 0.5, 0.5, -0.5, 0, None]) == 0.625


@given(st.lists(st.one_of(st.integers(-10, 10).map(lambda i: i / 20), MISSING), max_size=9).filter(present))
@example([0.1, 0.2, 0.3])  # .1 + .2 - .3 is not 0 in floats
@example([0.1, 0.2, -0.3])
@example([0.7, 0.1, 0.3, -0.6])
@example([0.0, 0, None])
def test_sign_permutation_is_the_full_enumeration(differences):
    assert sign_permutation(differences) == enumerated(differences)


@given(st.lists(st.integers(-10, 10).map(lambda i: i / 20), min_size=1, max_size=9), st.sampled_from([-1, 1e-9, 3.3, 1e9]))
def test_sign_permutation_knows_no_sign_order_or_unit(differences, unit):
    assert sign_permutation([unit * d for d in reversed(differences)]) == sign_permutation(differences)


def test_sign_permutation_of_rounded_thirds():
    """Rubric scores are float32: 2/3 - 1/3 and 1 - 2/3 differ in the eighth digit, and are the same difference."""
    x, y = [1, 0, 3, 1, 3, 1, 2, 1, 3, 2], [1, 1, 2, 2, 1, 2, 2, 1, 3, 3]
    rounded = np.float32(x) / np.float32(3) - np.float32(y) / np.float32(3)
    assert sign_permutation(rounded) == enumerated([a - b for a, b in zip(x, y)])


def test_sign_permutation_is_exact_up_to_2_to_the_k_samples():
    differences = [0.5, 0.4, 0.3, -0.1, 0.05, 0.2, 0, 0, None]  # k = 6
    assert sign_permutation(differences, samples=64, seed=1) == sign_permutation(differences, samples=64, seed=2) == enumerated(differences)
    sampled = {sign_permutation(differences, samples=63, seed=seed) for seed in range(9)}
    assert len(sampled) > 1 and all((p * 64).is_integer() and p > 0 for p in sampled)  # (1 + hits) / (1 + 63)


def test_sign_permutation_by_monte_carlo_agrees_with_enumeration():
    differences = np.random.default_rng(21).normal(0.25, 0.5, size=11)
    exact = sign_permutation(differences, samples=2048)
    assert exact == enumerated(differences) and 0.05 < exact < 0.5
    sampled = np.array([sign_permutation(differences, samples=2000, seed=seed) for seed in range(60)])
    spread = math.sqrt(exact * (1 - exact) / 2000)
    assert abs(sampled.mean() - exact) < 4 * spread / math.sqrt(60) + 1 / 2000
    assert 0.7 < sampled.std() / spread < 1.3


def test_sign_permutation_is_never_zero_by_monte_carlo():
    assert sign_permutation([0.5] * 40, samples=99) == 0.01
    assert sign_permutation([0.5] * 5000, samples=9) == 0.1


@pytest.mark.parametrize("samples", [300, 4096])
def test_sign_permutation_is_uniform_when_the_mean_is_zero(samples):
    data = np.random.default_rng(31).normal(size=(400, 12))
    p = np.sort([sign_permutation(row, samples=samples, seed=i) for i, row in enumerate(data)])
    assert np.abs(p - (np.arange(400) + 0.5) / 400).max() < 1.63 / 20  # Kolmogorov-Smirnov, 1 %


# ---------------------------------------------------------------- agreement


def slow_kappa(pairs):
    n = len(pairs)
    if not n:
        return NAN
    observed = Fraction(sum(x == y for x, y in pairs), n)
    labels = {x for pair in pairs for x in pair}
    chance = sum(Fraction(sum(x == label for x, _ in pairs), n) * Fraction(sum(y == label for _, y in pairs), n) for label in labels)
    return NAN if chance == 1 else float((observed - chance) / (1 - chance))


@pytest.mark.parametrize("a, b, want", [([1, 0], [1, 0], 1), ([1, 0], [0, 1], -1), ([1, 1, 0, 0], [1, 0, 1, 0], 0), ([1, 1], [1, 1], NAN),
                                        ([1], [0], 0), ([1, None, 0], [1, 0, None], NAN), ([1] * 25 + [0] * 25, [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15, 0.4)])
def test_kappa_of_small_cases(a, b, want):
    assert same(agreement(a, b)["kappa"], want, 1e-15) and same(agreement(b, a)["kappa"], want, 1e-15)


@pytest.mark.parametrize("a, b", [([1, 0], [1]), ([1], [1, 0]), ([], [None]), ([0.5, 1, None], [1, 0])])
def test_different_lengths_are_refused(a, b):
    with pytest.raises(ValueError):
        agreement(a, b)


def test_agreement_docstring_example():
    got = agreement([1, 0.9, 0, 0.5, 1, None], [0.8, 0.6, 0.3, 1, 0, 1])
    assert got == dict(n=5, agreement=0.6, kappa=pytest.approx(2 / 7, abs=1e-15))


@given(COARSE, COARSE)
@example([0.5, 0.5], [0.5, 1])
@example([math.nextafter(0.5, 1)], [math.nextafter(0.5, 0)])
def test_agreement_is_the_slow_count(a, b):
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    pairs = [("win" if x > 0.5 else "loss" if x < 0.5 else "tie", "win" if y > 0.5 else "loss" if y < 0.5 else "tie")
             for x, y in zip(a, b) if present([x]) and present([y])]  # fmt: skip
    got = agreement(a, b)
    assert list(got) == ["n", "agreement", "kappa"] and got["n"] == len(pairs)
    assert same(got["agreement"], sum(x == y for x, y in pairs) / len(pairs) if pairs else NAN)
    assert same(got["kappa"], slow_kappa(pairs), 1e-12)


# ---------------------------------------------------------------- logistic


def sigmoid(u):
    return (1 + np.tanh(u / 2)) / 2


def test_logistic_docstring_example():
    assert logistic(np.ones((4, 1)), np.array([1, 1, 1, 0])) == pytest.approx([math.log(3)], abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("separable", [False, True])
def test_logistic_is_the_minimum_of_the_penalised_loss(seed, separable):
    """The gradient of mean cross-entropy + 1e-6/2 |w|^2 is 0, for any number of columns, also where no finite weights would be without the ridge."""
    rng = np.random.default_rng(seed)
    X = np.stack([np.ones(300), rng.normal(size=300), rng.standard_cauchy(300)][: 2 + seed % 2], 1)
    u = X @ [0.4, -1.5, 0.2][: X.shape[1]]
    y = (u > 0) * 1.0 if separable else rng.random(300) < sigmoid(u)
    w = logistic(X, y)
    assert w.shape == (X.shape[1],) and w.dtype == float and np.isfinite(w).all()
    assert np.abs(X.T @ (sigmoid(X @ w) - y) / 300 + 1e-6 * w).max() < 1e-9
    if not separable:
        assert w == pytest.approx([0.4, -1.5, 0.2][: len(w)], abs=0.6)


# ---------------------------------------------------------------- all


@pytest.mark.parametrize("nothing", NOTHING)
def test_nothing_is_quietly_nan(nothing):
    assert all(math.isnan(x) for x in bootstrap_interval(nothing))
    assert math.isnan(sign_permutation(nothing))
    got = win_rate(nothing)
    assert all(math.isnan(got.pop(name)) for name in ("win_rate", "standard_error", "low", "high"))
    assert got == dict(n=0, wins=0, ties=0, losses=0, missing=len(nothing))
    got = agreement(nothing, nothing)
    assert got.pop("n") == 0 and all(math.isnan(x) for x in got.values())


def test_one_item_is_quiet():
    assert bootstrap_interval([0.3]) == (0.3, 0.3) and sign_permutation([0.3]) == 1 and sign_permutation([0]) == 1
    assert win_rate([0.3])["win_rate"] == 0.3 and math.isnan(win_rate([0.3])["standard_error"])
    assert agreement([1], [0])["agreement"] == 0 and agreement([0.5], [0.5])["agreement"] == 1


@pytest.mark.parametrize("kind", [tuple, np.array, lambda x: np.array(x, dtype=object)])
def test_lists_tuples_and_arrays_are_the_same_and_stay_as_they_are(kind):
    a, b = [1.0, 0.0, 0.5, 0.8, NAN], [0.0, 0.0, 1.0, 0.9, 0.1]
    x, y = kind(a), kind(b)
    calls = [win_rate, bootstrap_interval, sign_permutation, lambda v: agreement(v, y)]
    for call in calls:
        assert repr(call(x)) == repr(call(a))
    assert repr(list(map(float, x))) == repr(a) and repr(list(map(float, y))) == repr(b)


def test_results_are_plain_python_numbers():
    a, b = np.array([1, 0, 0.5, 0.8]), np.array([0, 0, 1, 0.9])
    results = [win_rate(a), agreement(a, b), bootstrap_interval(a), sign_permutation(a)]
    assert all(type(r) in (dict, tuple, float) for r in results)
    numbers = [*results[0].values(), *results[1].values(), *results[2]]
    assert all(type(x) in (int, float) for x in numbers) and json.dumps(results)

"""train.py with the average that CME's public code takes in place of the conserving alignment; for toy/claims.py.

    python toy/average.py --seed 0     # options: train.py's
"""
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts, one folder up
import cme  # noqa: E402
import train  # noqa: E402
from plumbing import one_clear_line  # noqa: E402


def average(values, source, target):
    """What CME's public code does instead of `align`: the mean over the verifier's tokens that a token overlaps, which conserves nothing."""
    (values, source, target), zero = (np.asarray(x, float) for x in (values, source, target)), np.zeros(len(target))
    if len(values) == 0:
        return zero
    meet = np.minimum(source[:, None, 1], target[:, 1]) > np.maximum(source[:, None, 0], target[:, 0])  # [N, T]
    return values @ meet / np.maximum(meet.sum(0), 1)


if __name__ == "__main__":
    cme.align = average
    one_clear_line(train.main, "toy/average.py")

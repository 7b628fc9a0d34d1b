"""Who is trained on: successive halving of the options of every block. Knows no torch, and trains nothing.

Source: Karnin, Koren, Somekh 2013, "Almost optimal exploration in multi-armed bandits"; Jamieson, Talwalkar 2016,
"Non-stochastic best arm identification and hyperparameter optimization" (arXiv:1502.07943). We differ: options are not
compared by what they lose themselves, since a budget needs some of every size, but by what the best student with them
loses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from distill.search.choice import Option, choose

ROUNDS = 3


def ends(steps: int) -> tuple[int, ...]:
    """Return at which step every round ends, of `steps` in all (at least 4): each at twice the step of the one before,
    when half as many are left."""
    return tuple(steps // 2**later for later in reversed(range(ROUNDS)))


def regrets(options: Sequence[Option], places: Iterable[int], limits: Mapping[str, float]) -> dict[int, float]:
    """Return by how much more than the best choice the best one with each of the options at `places` loses; infinity
    where none with it keeps to the limits."""
    best = choose(options, limits)
    if best is None:
        return dict.fromkeys(places, math.inf)
    found = {}
    for place in places:
        one = options[place]
        # no other option for its blocks: this one is taken
        forced = choose([other for other in options if other is one or not other.covers & one.covers], limits)
        found[place] = math.inf if forced is None else max(0.0, forced.loss - best.loss)
    return found


def halved(options: Sequence[Option], regret: Mapping[int, float]) -> list[int]:
    """Return in their order the places that stay of those that have a regret: of the options for the same blocks the
    half with the least (of an odd number one more), of equals the first, and none with which no choice can be had."""

    def covers(place: int) -> list[int]:
        return sorted(options[place].covers)

    stay: list[int] = []
    for _, group in groupby(sorted(regret, key=covers), key=covers):
        places = sorted(group, key=lambda place: (regret[place], place))
        stay += [place for place in places[: (len(places) + 1) // 2] if math.isfinite(regret[place])]
    return sorted(stay)

"""A whole placement as one mixed-integer programme: is there a shorter one than is known, and how short can any be?
No torch.

The variables say which block is `on` which rank and which neighbours are `together` there, how far every rank runs a
teacher of its own (`reach`), the `makespan`, and whether `none` is shorter. That is always a solution, as good as what
is known: so HiGHS has a bound to tell wherever it stops. Seconds are in units of the limit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from distill.planning.placement.packing import Floats, Packing

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint

log = logging.getLogger(__name__)

VARIABLES = 2000  # up to which the programme is solved: with links about 1000 pairs of a block and a rank
EFFORT = 100_000  # variables times nodes of branch and bound; not a time limit, so that plans are repeatable
ROUNDING = 1e-6  # HiGHS' own, in units of the limit


def shorter(
    packing: Packing, limit_s: float, *, reached_s: float, tolerance: float
) -> tuple[NDArray[np.intp] | None, float]:
    """Return a placement within `limit_s` (N: the rank of every block) or None, and a makespan that no placement beats:
    `reached_s`, which is known to be one, or a longer one.

    The search ends where a placement is proven to be within the relative `tolerance` of the best, or none within the
    limit is possible, or after a fixed effort.
    """
    columns = _columns(packing)
    variables = columns["none"].stop
    if variables > VARIABLES:
        return None, reached_s
    from scipy.optimize import milp  # here: importing it takes half a second, and few plans need it

    cost, whole, most = np.zeros(variables), np.zeros(variables), np.ones(variables)
    # To give up costs as much as a makespan of just the limit: any placement within the limit is cheaper.
    cost[columns["makespan"]] = cost[columns["none"]] = 1
    # What is together, and reaches, need not be declared whole: where `on` is, the makespan pulls them to their ends.
    whole[columns["on"]] = whole[columns["none"]] = 1
    # Not 1: a rank that is faster than the mean (slowness below 1) has room for a reach longer than the limit.
    most[columns["reach"]] = np.inf
    most[columns["on"]] = _allowed(packing, limit_s).ravel()
    solved = milp(
        cost,
        integrality=whole,
        bounds=(0.0, most),
        constraints=list(_constraints(packing, columns, limit_s, reached_s)),
        options={"node_limit": 1 + EFFORT // variables, "mip_rel_gap": tolerance},
    )
    if solved.x is None or solved.mip_dual_bound is None or not np.isfinite(solved.mip_dual_bound):
        log.warning("the placement stays as found, its bound a simple one: HiGHS failed (%s)", solved.message)
        return None, reached_s
    bound_s = max(reached_s, (min(1.0, solved.mip_dual_bound) - ROUNDING) * limit_s)
    if solved.x[columns["none"]] > 0.5:
        return None, bound_s
    return solved.x[columns["on"]].reshape(packing.num_blocks, packing.num_ranks).argmax(axis=1), bound_s


def _joint(packing: Packing) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the blocks, and with each a rank, that it is cheaper to send to together with the block before."""
    blocks, ranks = np.nonzero(packing.shared_s[:, None] * packing.price * packing.sends)
    return blocks, ranks


def _columns(packing: Packing) -> dict[str, slice]:
    """Return where the variables of every kind are."""
    number = {
        "on": packing.num_blocks * packing.num_ranks,
        "together": len(_joint(packing)[0]),
        "reach": packing.num_ranks * packing.reaches,
        "makespan": 1,
        "none": 1,
    }
    ends = np.cumsum(list(number.values())).tolist()
    return {kind: slice(end - count, end) for (kind, count), end in zip(number.items(), ends, strict=True)}


def _allowed(packing: Packing, limit_s: float) -> NDArray[np.bool_]:
    """Return which blocks may be on which ranks (N, W): not where one alone exceeds the limit; and of ranks that are
    alike, which any placement may exchange, the largest block only on the first, the next on the first two, and so on.
    """
    largest = packing.work_s + packing.reach_s
    fits = packing.base_s + packing.slowness * largest[:, None] <= limit_s
    room = 0 * packing.base_s if packing.room is None else packing.room
    teaches = np.arange(packing.num_ranks) < packing.teacher_ranks * packing.sends
    features = np.stack([packing.slowness, packing.base_s, packing.price, room, teaches])
    kind = np.unique(features, axis=1, return_inverse=True)[1].ravel()
    alike_before = np.array([(kind[:rank] == kind[rank]).sum() for rank in range(packing.num_ranks)])
    larger = np.argsort(np.argsort(-largest, kind="stable"))  # blocks, for every block
    return fits & (larger[:, None] >= alike_before)


def _constraints(
    packing: Packing, columns: dict[str, slice], limit_s: float, reached_s: float
) -> Iterator[LinearConstraint]:
    """Yield what the variables must keep to, one kind of constraint after another."""
    from scipy.optimize import LinearConstraint

    def rows(count: int, **parts: Floats | float) -> Floats:
        found = np.zeros((count, columns["none"].stop))
        for kind, part in parts.items():
            found[:, columns[kind]] = part
        return found

    number, ranks = packing.num_blocks, packing.num_ranks
    every_rank = np.eye(ranks)
    yield LinearConstraint(rows(number, on=np.repeat(np.eye(number), ranks, axis=1), none=1), 1, 1)
    # Nothing beats what is known as a bound: said here, the search need not find it out. `none` has no makespan.
    yield LinearConstraint(rows(1, makespan=1, none=reached_s / limit_s), lb=reached_s / limit_s)

    teaches = packing.sends * (np.arange(ranks) < packing.teacher_ranks) / packing.teacher_ranks
    pays = (teaches * packing.slowness)[:, None] * packing.price * (1 - every_rank)  # a rank for what is sent to others
    seconds = np.einsum("j,tr->tjr", packing.work_s, np.diag(packing.slowness))
    seconds += np.einsum("j,tr->tjr", packing.wire_s, pays)
    blocks, at = _joint(packing)
    busy = rows(
        ranks,
        on=seconds.reshape(ranks, -1) / limit_s,
        together=-packing.shared_s[blocks] * pays[:, at] / limit_s,
        makespan=-1,
        none=-packing.base_s[:, None] / limit_s,
    )
    if packing.reaches:
        busy[:, columns["reach"]] = np.diag(packing.slowness)
        reach = np.diag(np.repeat(packing.reach_s / limit_s, ranks))
        yield LinearConstraint(rows(len(reach), on=reach, reach=-np.tile(every_rank, (number, 1))), ub=0)
    yield LinearConstraint(busy, ub=-packing.base_s / limit_s)
    for each in (blocks, blocks - 1) if len(blocks) else ():  # both neighbours must be there
        there = np.eye(number * ranks)[each * ranks + at]
        yield LinearConstraint(rows(len(each), on=-there, together=np.eye(len(each))), ub=0)
    if packing.bytes is not None and packing.room is not None:
        # Shares and not bytes: the tolerances of HiGHS are absolute, made for numbers near 1.
        total = packing.bytes.sum()
        sizes: Floats = np.kron(packing.bytes / total, every_rank)
        yield LinearConstraint(rows(ranks, on=sizes), ub=np.maximum(packing.room, 0) / total)

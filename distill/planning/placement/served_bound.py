"""What serving the others costs rank 0 at least: a bound for a broadcast, and which blocks rank 0 had better keep.

Only rank 0 is looked at closely; the others are one rank with all of their speed, except that each of those which are
needed begins a run of neighbouring blocks. Exact for two ranks. No torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distill.planning.placement.packing import Packing

NODES = 200  # of the programme's branch and bound: not a time limit, so that the same problem gives the same plan


def served_bound(packing: Packing, *, upper_s: float, tolerance: float) -> tuple[float, NDArray[np.bool_]]:
    """Return a makespan that no placement beats, given one of `upper_s`, and which blocks (N) leave rank 0 in it.

    The variables are: which blocks leave rank 0 (x), which of them are together with the block before (z), how many
    ranks they need (m), and the makespan.
    """
    from scipy.optimize import LinearConstraint, milp  # here, as in lower_bound.py

    number, others = packing.num_blocks, packing.slowness[1:]
    price = float(packing.price[1:].min())
    eye, zero = np.eye(number), np.zeros((number, 1))
    before = np.vstack([np.zeros(number), eye[:-1]])
    pays = np.concatenate(
        [
            packing.slowness[0] * (price * packing.wire_s - packing.work_s),
            -packing.slowness[0] * price * packing.shared_s, [0.0, -1.0],
        ]
    )  # fmt: skip
    all_on_0 = float(packing.base_s[0] + packing.slowness[0] * packing.work_s.sum())
    fits = np.concatenate([packing.work_s, np.zeros(number), [0.0, -float((1 / others).sum())]])
    needs = np.concatenate([packing.work_s, np.zeros(number), [-upper_s * float((1 / others).max()), 0.0]])
    begins = np.concatenate([-np.ones(number), np.ones(number), [1.0, 0.0]])
    solved = milp(
        np.concatenate([np.zeros(2 * number + 1), [1.0]]),
        integrality=np.concatenate([np.ones(number), np.zeros(number), [1.0, 0.0]]),
        bounds=(0.0, np.concatenate([np.ones(2 * number), [len(others), np.inf]])),
        constraints=[
            LinearConstraint(pays, -np.inf, -all_on_0),
            LinearConstraint(np.stack([fits, needs, begins]), -np.inf, 0.0),
            LinearConstraint(np.hstack([-eye, eye, zero, zero]), -np.inf, 0.0),
            LinearConstraint(np.hstack([-before, eye, zero, zero]), -np.inf, 0.0),
        ],
        options={"node_limit": NODES, "mip_rel_gap": tolerance / 2},
    )
    leaves = np.zeros(number, bool) if solved.x is None else solved.x[:number] > 0.5
    return float(solved.mip_dual_bound or 0.0), leaves

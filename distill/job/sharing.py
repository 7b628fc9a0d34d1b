"""Numbered tasks that the ranks share out: each says what its own came to, and rank 0 hears all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from distill.job.context import Context

TOLD_EVERY_S = 30.0


def answers_of_all(
    context: Context,
    stage: str,
    shares: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], Iterable[tuple[int, Any]]],
    *,
    purpose: str,
    did: str,
) -> tuple[list[Any], float] | None:
    """Do this rank's share of a stage by `work`, which yields every task's number with its answer as a JSON value.

    Returns all answers in the order of `shares` and the CPU seconds of all ranks, on rank 0; None elsewhere. Every rank
    must call. Rank 0 says now and then how much it `did`.
    """
    start, cpu, own = time.monotonic(), time.process_time(), shares[context.rank]
    told = start
    for done, (number, answer) in enumerate(work(own), start=1):
        context.control.set(f"{stage}/{number}", answer)
        if time.monotonic() - told > TOLD_EVERY_S:  # large networks take minutes
            told = time.monotonic()
            context.say(f"{stage}: {done} of this rank's {len(own)} {did}, {told - start:.0f} s so far")
    context.control.set(f"{stage}/cpu/{context.rank}", time.process_time() - cpu)
    if not context.leads:
        return None
    wait = context.control.wait
    answers = [wait(f"{stage}/{number}", peer=r, purpose=purpose) for r, own in enumerate(shares) for number in own]
    return answers, sum(wait(f"{stage}/cpu/{r}", peer=r, purpose=f"end of {stage}") for r in range(len(shares)))

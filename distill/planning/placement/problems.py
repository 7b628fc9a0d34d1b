"""What a placement of blocks on ranks costs, one function a strategy whose blocks may be on any rank. No torch.

T_k is the teacher's forward of block k, S_u one step of unit u, b_k the bytes of boundary k (the input of block k).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np

from distill.planning.costs import Costs, Span, in_order, teacher_seconds
from distill.planning.placement.packing import Floats, Packing
from distill.planning.placement.search import Problem, Share
from distill.planning.unit import boundaries_of


def broadcast_problem(costs: Costs, spans: Sequence[Span], world_size: int, teacher_ranks: int = 1) -> Problem:
    """Return what a placement costs where the first `teacher_ranks` ranks run the teacher for everybody in turn."""
    spans = in_order(spans)
    teacher_s = teacher_seconds(costs, spans)
    sizes = costs.boundary_bytes
    price = [_price_of_serving(costs, rank, teacher_ranks) for rank in range(world_size)]

    def share(owned: Sequence[Span], rank: int) -> Share:
        size = sum(sizes[boundary] for boundary in boundaries_of(owned))
        wire = max((span.steps for span in owned), default=0) * size * price[rank]
        return sum(costs.student_s[span.unit] * span.steps for span in owned), wire

    def loads(shares: Sequence[Share]) -> list[float]:
        wires = sum(wire for _, wire in shares)  # what a teacher rank computes itself does not travel to it
        taught = [(teacher_s + wires - wire) / teacher_ranks for _, wire in shares[:teacher_ranks]]
        taught += [0.0] * (world_size - teacher_ranks)
        return [
            (own + more) * costs.slowness_of(rank)
            for rank, ((own, _), more) in enumerate(zip(shares, taught, strict=True))
        ]

    bases = [teacher_s / teacher_ranks * costs.slowness_of(rank) for rank in range(teacher_ranks)]
    bases += [0.0] * (world_size - teacher_ranks)
    bytes_needed, room = _limits(costs, spans, [rank < teacher_ranks for rank in range(world_size)])
    wire, shared = _wires(sizes, spans)
    return Problem(
        spans=spans,
        world_size=world_size,
        work=lambda span, rank: costs.student_s[span.unit] * span.steps * costs.slowness_of(rank),
        share=share,
        loads=loads,
        base=bases,
        kind=[(rank < teacher_ranks, costs.slowness_of(rank), price[rank]) for rank in range(world_size)],
        packing=Packing(
            work_s=np.array([costs.student_s[span.unit] * span.steps for span in spans]),
            reach_s=np.zeros(len(spans)),
            wire_s=np.array(wire),
            shared_s=np.array(shared),
            slowness=np.array([costs.slowness_of(rank) for rank in range(world_size)]),
            base_s=np.array(bases),
            price=np.array(price),
            teacher_ranks=teacher_ranks,
            bytes=bytes_needed,
            room=room,
        ),
    )


def _limits(costs: Costs, spans: Sequence[Span], sends: Sequence[bool]) -> tuple[Floats, Floats] | tuple[None, None]:
    """Return the memory of every span's block and the room of every rank; None where all would fit on any rank."""
    memory = costs.memory
    if memory is None or memory.limit is None:
        return None, None
    sizes = np.array([memory.unit(span.unit) for span in spans], float)
    room = np.array([memory.room(sends=one) for one in sends], float)
    return (None, None) if sizes.sum() <= room.min() else (sizes, room)


def _wires(sizes: Sequence[int], spans: Sequence[Span]) -> tuple[list[float], list[float]]:
    """Return for every span the bytes that are sent for it, and those of them that are not where the span before it is
    on its rank; together never more than what is really sent.

    A boundary that more spans need than two neighbours, as candidates of one block do, counts with the first alone:
    which of the others have it on their ranks anyway, neighbours do not tell.
    """
    users: dict[int, list[int]] = {}
    for place, span in enumerate(spans):
        for boundary in boundaries_of([span]):
            users.setdefault(boundary, []).append(place)
    wire, shared = [0.0] * len(spans), [0.0] * len(spans)
    for boundary, places in users.items():
        chained = len(places) == 1 or (len(places) == 2 and places[1] - places[0] == 1)
        for place in places if chained else places[:1]:
            wire[place] += sizes[boundary] * spans[place].steps
        if chained and len(places) == 2:
            shared[places[1]] += sizes[boundary] * min(spans[place].steps for place in places)
    return wire, shared


def _price_of_serving(costs: Costs, rank: int, teacher_ranks: int) -> float:
    """Seconds of computing that a byte for `rank` costs its sender, the mean over the other teacher ranks."""
    prices = [
        costs.network.link(teacher, rank).sender_s_per_byte for teacher in range(teacher_ranks) if teacher != rank
    ]
    # Without a price for the only teacher rank: what it computes itself does not travel.
    return sum(prices) / max(1, len(prices))


def replicate_problem(costs: Costs, spans: Sequence[Span], world_size: int) -> Problem:
    """Return what a placement costs where every rank runs the teacher for itself."""

    def share(owned: Sequence[Span], _rank: int) -> Share:
        return sum(map(work, owned)) + teacher_seconds(costs, owned), 0.0

    def work(span: Span) -> float:
        return costs.student_s[span.unit] * span.steps

    prefix = [0.0, *accumulate(costs.teacher_s)]
    return _independent(costs, spans, world_size, share, work, reach=lambda span: prefix[span.target] * span.steps)


def cached_problem(costs: Costs, spans: Sequence[Span], world_size: int) -> Problem:
    """Return what a placement costs where every rank reads its blocks' boundaries, neighbours' common ones once."""

    def share(owned: Sequence[Span], _rank: int) -> Share:
        size = sum(costs.boundary_bytes[boundary] for boundary in boundaries_of(owned))
        read_s = max((span.steps for span in owned), default=0) * size * costs.read_s_per_byte
        return sum(map(work, owned)) + read_s, 0.0

    def work(span: Span) -> float:
        return costs.student_s[span.unit] * span.steps

    return _independent(costs, spans, world_size, share, work)


def layerwise_problem(costs: Costs, spans: Sequence[Span], world_size: int) -> Problem:
    """Return what a placement costs where every block runs the teacher for itself."""
    prefix = [0.0, *accumulate(costs.teacher_s)]

    def work(span: Span) -> float:
        return span.steps * (costs.student_s[span.unit] + prefix[span.target])

    return _independent(costs, spans, world_size, lambda owned, _rank: (sum(map(work, owned)), 0.0), work)


def _independent(
    costs: Costs,
    spans: Sequence[Span],
    world_size: int,
    share: Callable[[Sequence[Span], int], Share],
    work: Callable[[Span], float],
    *,
    reach: Callable[[Span], float] = lambda _: 0.0,
) -> Problem:
    """Return the problem of ranks that have nothing to do with each other."""
    spans = in_order(spans)
    bytes_needed, room = _limits(costs, spans, [False] * world_size)
    return Problem(
        spans=spans,
        world_size=world_size,
        work=lambda span, rank: work(span) * costs.slowness_of(rank),
        share=share,
        loads=lambda shares: [own * costs.slowness_of(rank) for rank, (own, _) in enumerate(shares)],
        base=[0.0] * world_size,
        kind=[costs.slowness_of(rank) for rank in range(world_size)],
        packing=Packing(
            work_s=np.array([work(span) for span in spans]),
            reach_s=np.array([reach(span) for span in spans]),
            wire_s=np.zeros(len(spans)),
            shared_s=np.zeros(len(spans)),
            slowness=np.array([costs.slowness_of(rank) for rank in range(world_size)]),
            base_s=np.zeros(world_size),
            price=np.zeros(world_size),
            bytes=bytes_needed,
            room=room,
        ),
    )

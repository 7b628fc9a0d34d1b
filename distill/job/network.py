"""Wiring of the link probe: which ranks look at which link, and the network that comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from distill.config.choices import Cost
from distill.distributed.edges.probe import Arrivals, copy_price, probe_from, probe_to
from distill.distributed.edges.wire import Wire
from distill.distributed.transport import Edge
from distill.job.context import Context
from distill.planning.network import Link, Network

MOST_HOSTS = 8  # whose links to rank 0's host are probed; each takes about a second


def find_network(context: Context) -> Network:
    """Return what joins the ranks: probed with plan.cost=measured, otherwise links without limits on which sending
    costs a copy. Every rank must call; only rank 0's answer is whole."""
    copied = Link(sender_s_per_byte=_price(context, copy_price()))
    network = Network(copied, copied, context.roll_call.hosts)
    if context.config.plan.cost is Cost.measured:
        network = _probed(context, network)
    gbit = context.config.plan.link_gbit
    if gbit is not None:
        network = replace(network, between=replace(network.between, bytes_per_s=gbit * 1e9 / 8))
    if len(set(network.hosts)) > 1:
        context.say(f"plan: between hosts: {network.between}")
    elif gbit is not None:
        context.say(f"plan: plan.link_gbit={gbit:g} changes nothing here: all ranks are on one host")
    return network


def _probed(context: Context, unprobed: Network) -> Network:
    """Return the network with the slowest of the probed links within and between hosts in place of what is known."""
    hosts = unprobed.hosts
    found: dict[bool, list[Link]] = {True: [], False: []}
    for source, target in probe_pairs(hosts):
        link = _probe(context, source, target)
        if link is not None:
            found[hosts[source] == hosts[target]].append(link)
    return Network(slowest(found[True], unprobed.within), slowest(found[False], unprobed.between), hosts)


def probe_pairs(hosts: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs (source, target) of ranks that look at their link: two of the first host that has two, and the
    first of the first host with the first of every other (of MOST_HOSTS)."""
    members = {host: [rank for rank, at in enumerate(hosts) if at == host] for host in sorted(set(hosts))}
    within = next(([(ranks[0], ranks[1])] for ranks in members.values() if len(ranks) > 1), [])
    first, *others = (ranks[0] for ranks in members.values())
    return within + [(first, other) for other in others[:MOST_HOSTS]]


def slowest(links: Sequence[Link], otherwise: Link) -> Link:
    """Return the link with the least bandwidth, `otherwise` where there are none."""
    return min(links, key=lambda link: link.bytes_per_s, default=otherwise)


def _probe(context: Context, source: int, target: int) -> Link | None:
    """Probe one link where this rank is at one of its ends; rank 0 learns of all."""
    control, rank = context.control, context.rank
    if rank in (source, target):
        edge = Edge(source, target, control.generation, context.config.plan.timeout_s, name="probe")
        wire = Wire(
            device=context.device,
            backend=context.roll_call.wire_backend,
            shared_memory=context.config.plan.shared_memory,
        )
        store = control.store_for("probe")
        if rank == source:
            control.set(f"probe/{source}-{target}/price", _price(context, probe_from(edge, store, wire)))
        else:
            control.set(f"probe/{source}-{target}/arrivals", asdict(probe_to(edge, store, wire)))
    if not context.leads:
        return None
    price = control.wait(f"probe/{source}-{target}/price", peer=source, purpose="probe of a link")
    arrivals = Arrivals(**control.wait(f"probe/{source}-{target}/arrivals", peer=target, purpose="probe of a link"))
    return Link(arrivals.bytes_per_s, arrivals.latency_s, price)


def _price(context: Context, seconds: float) -> float:
    """On an accelerator sending takes no time from the computing."""
    return seconds if context.device.type == "cpu" else 0.0

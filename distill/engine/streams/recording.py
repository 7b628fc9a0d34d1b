"""The teacher's one pass over the fixed views, shared among the ranks of a host, and the stream that reads it back.

An activation's last bits may depend on the batch that it was computed in. So images are recorded in the batches of
Dataset.fixed_batches(), whoever records them, and what students see is a function of the configuration alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from distill.blocks.chain import Chain
from distill.cache.places import Place
from distill.cache.rows import Cache, Layout, map_file
from distill.distributed.store import Control
from distill.engine.streams.cached import Contents, Recorded
from distill.observability.trace import Trace


def record(
    make_place: Callable[[], Place],
    *,
    layout: Layout,
    contents: Contents,
    chain: Chain,
    device: torch.device,
    control: Control,
    peers: list[int],
    trace: Trace,
) -> Recorded:
    """Return the cache of this host, recorded now unless its place is complete. Called by all of the host's ranks,
    `peers`, of which the first makes the place; each records its share and waits for the others'."""
    leader = peers[0]
    place = make_place() if control.rank == leader else None
    if place is not None:
        place.check()
        if not place.complete:
            place.reserve(layout.nbytes)
        # after the memory is reserved: the others map all of it as soon as they read this
        control.set(f"cache/place/{leader}", {"path": str(place.path), "complete": place.complete})
    found = control.wait(f"cache/place/{leader}", peer=leader, purpose="place of the cache")
    cache = Cache(map_file(Path(found["path"]), layout.nbytes), layout)
    passes = 0
    if not found["complete"]:
        with trace.span("record", "own share"):
            for first, images in contents.inputs(peers.index(control.rank), len(peers)):
                cache.write(first, chain.run(images, last=max(layout.forms), keep=layout.forms.keys()))
                passes += 1
    # said even where nothing was to record: rank 0 adds up every rank's passes at the end
    control.set(f"cache/share/{control.rank}", {"passes": passes})
    with trace.span("record", "wait for the other ranks"):
        for peer in peers:
            control.wait(f"cache/share/{peer}", peer=peer, purpose="share of the cache")
        if place is not None:
            # not before everybody's share: in memory the path goes with this handle, and all have mapped it by now
            if not place.complete:
                place.finish()
            control.set(f"cache/end/{leader}", True)
        control.wait(f"cache/end/{leader}", peer=leader, purpose="end of recording")
    return Recorded(cache, contents, device)

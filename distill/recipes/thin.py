"""The recipe that makes a block narrower inside: channels that neither its input nor its output has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from distill.blocks.tracing import UntraceableError
from distill.profiling.statistics import InputStatistics
from distill.recipes.channels import inner_groups, traced
from distill.recipes.group import Group
from distill.recipes.heads import PROJECTIONS, closed_attention, opened
from distill.recipes.narrowing import Narrowing, groups_of, watchable
from distill.recipes.recipe import Changes, Kept, View
from distill.recipes.soundness import sound
from distill.recipes.thin_start import choose


@dataclass(frozen=True, kw_only=True)
class Thin(Narrowing):
    """Fewer channels inside a block, chosen by optimal brain surgeon over channels, which repairs the other weights."""

    replaces: ClassVar[str] = "channels inside a block, between two of its convolutions or linear layers"

    def propose(self, view: View) -> tuple[Changes | None, Kept]:
        block, x = view.module.eval(), view.sample.float()
        try:
            closed = closed_attention(traced(block, x))
            heads = [path for path, reason in closed.items() if reason is None and path in view.changeable]
            block = opened(block, heads)
            changeable = view.changeable.union(f"{path}.{layer}" for path in heads for layer in PROJECTIONS)
            groups, kept = inner_groups(block, x)
        except UntraceableError as error:
            return None, {view.name: f"its channels cannot be followed: {str(error).partition(chr(10))[0]}"}
        kept |= {path: reason for path, reason in closed.items() if reason is not None and path in view.changeable}
        narrower = []
        for group in map(self.narrowed, groups):
            reason = _objection(group, block, changeable)
            if reason is None:
                narrower.append(group)
            else:
                kept |= {site.path: reason for site in group.producers}
        narrower, failed = sound([block], x, narrower)
        kept |= failed
        if not groups and not kept:
            kept[view.name] = "no channels are inside it alone"
        if not narrower:
            return None, kept
        return {"groups": [group.as_json() for group in narrower], "statistics": watchable(block, narrower)}, kept

    def settle(self, block: nn.Module, changes: Changes, statistics: Mapping[str, InputStatistics]) -> list[Tensor]:
        return choose(block, groups_of(changes), statistics)


def _objection(group: Group, block: nn.Module, changeable: frozenset[str]) -> str | None:
    layers = [path for path in group.paths if any(True for _ in block.get_submodule(path).parameters(False))]
    if not changeable.issuperset(layers):
        return "a layer that has its channels is to stay"
    if group.kept == group.units:
        return f"none of its {group.units * group.step} channels would go"
    return None

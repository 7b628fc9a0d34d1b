"""What passes between the blocks of a whole network: which streams there are, which neighbours of one another, and what
changes in every block where some of them become narrower."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from distill.recipes.channels import Followed, Part, follow
from distill.recipes.group import Group, places_in
from distill.recipes.narrowing import watchable
from distill.recipes.recipe import Changes, Kept
from distill.recipes.soundness import sound
from distill.recipes.stream import Stream
from distill.recipes.widths import aligned

LONGEST = 4  # streams that are neighbours and are tried together; and all of them


@dataclass(frozen=True)
class Crossing:
    """The streams of a whole network: `modules` are all its blocks in eval mode, `x` the first one's input (two rows or
    more), `blocks` says which has a layer, by its path. A stream is a group of `found`, by its number."""

    modules: Sequence[nn.Module]
    x: Tensor
    found: Followed
    blocks: Mapping[str, int]

    @classmethod
    def of(cls, modules: Sequence[nn.Module], x: Tensor) -> Crossing:
        """Follow the channels of a network. Raises UntraceableError where a block has no graph."""
        blocks = {path: block for block, module in enumerate(modules) for path in places_in(module)}
        return cls(modules, x, follow(modules, x), blocks)

    @property
    def numbers(self) -> list[int]:
        """All streams."""
        return sorted({part.group for parts in self.found.boundaries for part in parts if part.group is not None})

    def runs(self) -> Iterator[dict[str, list[int]]]:
        """Yield the streams that may become narrower together, by the layer in which they begin: each alone, and up to
        LONGEST neighbours, or all. Neighbours have a block in common, so that nothing but an option of their own is for
        both; those that have none can be chosen apart."""
        first: dict[str, list[int]] = {}
        for number in self.numbers:
            first.setdefault(self.found.groups[number].producers[0].path, []).append(number)
        spans = {}
        for path, numbers in first.items():
            blocks = [self.blocks[path] for number in numbers for path in self.found.groups[number].paths]
            spans[path] = min(blocks), max(blocks)
        paths = sorted(spans, key=lambda path: spans[path])
        for start in range(len(paths)):
            end = spans[paths[start]][1]
            for stop in range(start + 1, len(paths) + 1):
                run = paths[start:stop]
                if spans[run[-1]][0] > end:
                    break
                end = max(end, spans[run[-1]][1])
                if len(run) <= LONGEST or len(run) == len(paths):
                    yield {path: first[path] for path in run}

    def narrowed(
        self, recipes: Mapping[int, Stream], only: Collection[int] | None = None
    ) -> tuple[dict[int, Changes], Kept]:
        """Return what changes in which blocks, and why other streams stay. `recipes` are those of the blocks that take
        part, `only` the streams that do (None: all).

        A stream is as wide as the blocks that make it are asked for. Which units stay is not chosen yet: of every group
        the first.
        """
        kept = {path: reason for path, reason in self.found.kept.items() if path in self.found.crossing}
        streams, stay = self._asked(recipes, self.numbers if only is None else sorted(only))
        groups, failed = sound(self.modules, self.x, list(streams.values()))
        streams = {number: group for number, group in streams.items() if group in groups}
        changed = set().union(*(group.paths for group in groups))
        kept = {path: reason for path, reason in (kept | stay | failed).items() if path not in changed}
        found = ((block, _changes(block, module, self.found, streams)) for block, module in enumerate(self.modules))
        return {block: changes for block, changes in found if changes is not None}, kept

    def _asked(self, recipes: Mapping[int, Stream], numbers: Iterable[int]) -> tuple[dict[int, Group], Kept]:
        """Return those of the streams, by number, with the units that are to stay, and why others stay whole."""
        asked: dict[int, Stream] = {}
        kept: Kept = {}
        for number in numbers:
            group = self.found.groups[number]
            layers = [path for path in group.paths if self._layer(path).state_dict()]
            making = {recipes.get(self.blocks[site.path]) for site in group.producers}
            one = making.pop()
            if one is None or not recipes.keys() >= {self.blocks[path] for path in layers}:
                why = "a block that has its channels has another recipe, or none"
            elif making:
                why = "the blocks that make its channels ask for several widths"
            else:
                asked[number] = one
                continue
            kept |= {site.path: why for site in group.producers}
        groups = {number: self.found.groups[number] for number in asked}
        outputs = {
            site.path: len(self._layer(site.path).weight)  # type: ignore[arg-type]
            for group in groups.values()
            for site in group.producers
        }
        narrower = _widths(groups, asked, outputs)
        whole = [group for group in narrower.values() if group.kept == group.units]
        for group in whole:
            reason = f"none of its {group.units * group.step} channels would go"
            kept |= {site.path: reason for site in group.producers}
        return {number: group for number, group in narrower.items() if group not in whole}, kept

    def _layer(self, path: str) -> nn.Module:
        return self.modules[self.blocks[path]].get_submodule(path)


def _widths(groups: Mapping[int, Group], asked: Mapping[int, Stream], outputs: Mapping[str, int]) -> dict[int, Group]:
    """Return the groups with the units that are to stay, so that the narrowest layer that makes a group is as wide as
    asked; `outputs` are the widths of layers. Groups that are beside others in that have what is left for them."""
    each = {number: Counter[str]() for number in groups}  # channels of a unit, by layer
    for number, group in groups.items():
        for site in group.producers:
            each[number][site.path] += site.each
    layer = {number: min(each[number], key=lambda path: outputs[path]) for number in groups}
    found: dict[int, Group] = {}
    for number in sorted(groups, key=lambda number: (outputs[layer[number]], number)):
        path, group = layer[number], groups[number]
        beside = [other for other in groups if each[other][path]]
        waiting = sum(each[other][path] * groups[other].units for other in beside if other not in found)
        gone = sum(each[other][path] * (one.units - one.kept) for other, one in found.items())
        wanted = aligned(asked[number].ratio * outputs[path], outputs[path], math.lcm(asked[number].align, group.step))
        left = max(0, wanted - (outputs[path] - gone - waiting))
        found[number] = replace(group, kept=min(group.units, group.units * left // waiting))
    return dict(sorted(found.items()))


def _changes(block: int, module: nn.Module, found: Followed, streams: Mapping[int, Group]) -> Changes | None:
    """Return what a block loses, None where it has no layer that loses anything."""
    paths = places_in(module)
    ends = [found.boundaries[end] if 0 <= end < len(found.boundaries) else () for end in (block - 1, block)]
    passing = {part.group for parts in ends for part in parts}
    own = {number: group.within(paths) for number, group in streams.items()}
    own = {number: group for number, group in own.items() if group.paths or number in passing}
    if not any(group.paths for group in own.values()):
        return None
    reads, gives = (_parts(parts, list(own)) for parts in ends)
    return {
        "groups": [group.as_json() for group in own.values()],
        "streams": list(own),
        "units": [list(range(group.kept)) for group in own.values()],
        "reads": reads,
        "gives": gives,
        "statistics": watchable(module, list(own.values())),
    }


def _parts(parts: Iterable[Part], own: Sequence[int]) -> list[list[Any]] | None:
    found = [[own.index(part.group) if part.group in own else None, part.units, part.each] for part in parts]
    return found if any(group is not None for group, _, _ in found) else None

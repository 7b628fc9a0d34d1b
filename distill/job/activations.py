"""Which activations the students of blocks get, where others than the teacher's are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from distill.blocks.chain import Chain
from distill.config.choices import ActivationName
from distill.config.schema import JobConfig
from distill.errors import ConfigError
from distill.job.candidates import Candidate
from distill.recipes import Kept
from distill.recipes.activations import KEY, calls_relu, relus, with_activation


@dataclass(frozen=True)
class Activations:
    """The activation of all students of a cut teacher."""

    chain: Chain
    name: str

    @classmethod
    def of(cls, config: JobConfig, chain: Chain) -> Activations | None:
        """Return what is asked for; None where activations stay."""
        return None if config.activation.name is ActivationName.keep else cls(chain, config.activation.name.name)

    @cached_property
    def _common(self) -> set[str]:
        """The paths of ReLUs that run in several blocks, of which one alone cannot have another."""
        modules = (self.chain.block_module(block.index) for block in self.chain.blocks if self.chain.divisible)
        return {path for path, blocks in Counter(path for one in modules for path in relus(one)).items() if blocks > 1}

    def candidate(self, one: Candidate) -> Candidate:
        """Return a candidate with this activation; one without weights, which is never trained, stays as it is."""
        if not one.trains:
            return one
        return replace(one, changes=with_activation(one.changes, self.name, one.built(self.chain), self._common))

    def pairs(self, found: Iterable[tuple[Candidate, nn.Module]]) -> list[tuple[Candidate, nn.Module]]:
        """Return candidates with their modules, both with this activation."""
        changed = [self.candidate(one) for one, _ in found]
        return [(one, one.built(self.chain)) for one in changed]

    def kept(self, candidates: Iterable[Candidate]) -> Kept:
        """Return the blocks of these candidates in which ReLUs stay, and why."""
        return dict(self._kept([one for one in candidates if one.trains]))

    def _kept(self, candidates: Iterable[Candidate]) -> Iterator[tuple[str, str]]:
        for one in candidates:
            block, student = self.chain.blocks[one.input].name, one.built(self.chain)
            if calls_relu(student):
                yield f"relu in {block}", "its code calls a function, no module"
            elif left := relus(student):
                yield f"{', '.join(left)} in {block}", "it runs in several blocks"

    def refuse_none(self, candidates: Iterable[Candidate]) -> None:
        """Raise ConfigError where no candidate has this activation anywhere."""
        if not any(KEY in one.changes for one in candidates):
            raise ConfigError("activation", self.name, "keep: no student block has a ReLU that is a module of its own")

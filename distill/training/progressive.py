"""Progressive blockwise distillation: a student's blocks trained on what they get in it, against the teacher's
activations and for the whole network's loss. What is trained, and what for; fit() trains.

Source: Wang, Zhao, Li, Tan 2018, "Progressive blockwise knowledge distillation for neural network acceleration", IJCAI.
We differ: it can begin with blocks that were trained in parallel, and train all of them in every step; the blocks' loss
is the normalised one, and the whole network's is that of fine-tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.blocks.chain import Chain
from distill.data import Batch
from distill.planning.unit import Channels
from distill.training.channels import narrowed
from distill.training.losses import relative_error
from distill.training.objective import Address, Objective, Outputs, Seen


class Amid(nn.Module):
    """A block between frozen ones, which are in eval mode and no part of the module: what it gets is what those before
    it give, and those behind it hand gradients on."""

    def __init__(self, before: Sequence[nn.Module], block: nn.Module, behind: Sequence[nn.Module]) -> None:
        super().__init__()
        self.block = block
        # In a tuple, where torch looks for no modules: neither trained nor put in training mode nor checkpointed.
        self._frozen = (tuple(map(frozen, before)), tuple(map(frozen, behind)))

    def forward(self, x: Tensor) -> Tensor:
        before, behind = self._frozen
        for module in before:
            x = module(x)
        x = self.block(x)
        for module in behind:
            x = module(x)
        return x


def frozen(module: nn.Module) -> nn.Module:
    """Return `module` itself, in eval mode and without gradients for its weights."""
    return module.eval().requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class Target:
    """Which of the teacher's boundaries a block's output is trained for, and which channels of it (None: all)."""

    boundary: int
    gives: Channels | None = None


class TeacherBlocks:
    """A teacher's outputs, of which what is tapped are boundaries, as narrow as the student's; run up to block `last`,
    whose output stands for the logits."""

    def __init__(self, chain: Chain, targets: Mapping[str, Target], *, last: int) -> None:
        self._chain, self._targets, self._last = chain, targets, last

    @torch.no_grad()
    def outputs(self, batch: Batch, address: Address) -> Outputs:
        wanted = {self._last, *(target.boundary for target in self._targets.values())}
        found = self._chain.run(batch.images, last=self._last, keep=wanted)
        taps = {path: narrowed(target.gives, found[target.boundary]) for path, target in self._targets.items()}
        return Outputs(found[self._last], taps)


class Progressive(Objective):
    """The sum of the blocks' losses, each the relative error of what is tapped, and `weight` times the whole network's
    objective. (Of several ranks each divides by the variance of its own rows.)"""

    def __init__(self, taps: Sequence[str], whole: Objective, *, weight: float) -> None:
        super().__init__()
        self.taps = tuple(taps)
        self.whole, self.weight = whole, weight

    def forward(self, seen: Seen) -> Tensor:
        errors = [relative_error(seen.student.taps[path], seen.teacher.taps[path]) for path in self.taps]
        loss = torch.stack(errors).sum()
        return loss if self.weight == 0 else loss + self.weight * self.whole(seen)

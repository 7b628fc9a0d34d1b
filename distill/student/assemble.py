"""The student network: the teacher's architecture with the trained blocks in place, and its batch-norm statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from distill.blocks.chain import Chain, agree, copied, made_trainable
from distill.recipes import Changes, Recipe
from distill.recipes.activations import install
from distill.storage.aliases import versioned


def assemble(
    teacher: nn.Module, *, changed: Iterable[tuple[Recipe, Changes]], blocks: Iterable[Mapping[str, Tensor]]
) -> nn.Module:
    """Return a copy of the teacher in which recipes have changed what they say, and whose weights are the blocks'.

    `blocks` are state dicts with the teacher's own qualified names, one a trained block, without overlap.
    """
    student = copied(teacher)
    for recipe, changes in changed:
        install(recipe, student, changes)
    state: dict[str, Tensor] = {}
    for weights in blocks:
        assert not state.keys() & weights.keys(), "two blocks hold the same weights"
        state |= weights
    unexpected = student.load_state_dict(versioned(student, state), strict=False).unexpected_keys
    assert not unexpected, unexpected
    return made_trainable(student).train(teacher.training)


@torch.no_grad()
def in_a_row(student: nn.Module, chain: Chain, modules: Mapping[int, nn.Module], x: Tensor) -> bool:
    """Whether the assembled student gives for `x` what the student blocks `modules` give one after another, all in eval
    mode; not so where the network's code reaches what was replaced in another way than by calling the module."""
    for module in (student, *modules.values()):
        module.eval()
    try:
        return agree(student(x), chain.run_with(modules, x))
    # A RuntimeError too, but one that says nothing about the student.
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a network's own code can raise anything
        return False


def remembering_norms(student: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the batch norms that have running statistics."""
    norms = (module for module in student.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [norm for norm in norms if norm.running_mean is not None]


@torch.no_grad()
def recalibrate(student: nn.Module, batches: Iterable[Tensor]) -> None:
    """Re-estimate every batch norm's running statistics as plain averages over the batches, in place.

    Blocks were trained on the teacher's activations; in the assembled network each sees the output of students. Only
    batch norms are put in training mode: dropout stays off.
    """
    norms = remembering_norms(student)
    momenta = [norm.momentum for norm in norms]
    student.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.training = True  # and not its parts: others' batch norms may hold dropout
    for images in batches:
        student(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    student.eval()

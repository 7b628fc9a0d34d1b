"""The blocks of a student reconciled: each was trained on the teacher's activations, and now gets what other students
give. Closed forms put right what they can, and validation images say which of them help.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from distill.blocks.memory_format import to_channels_last
from distill.data import Dataset
from distill.job.blocks import Blocks
from distill.job.context import Context
from distill.student.assemble import assemble, recalibrate, remembering_norms
from distill.student.evaluate import Hits, best_of, count_hits, images_at_a_time
from distill.student.refit import refit_in_a_row
from distill.training.channels import narrowed

TRAINED, UNTRAINED = "", "with first weights, "  # what a form's name begins with
AS_IT_IS, RE_ESTIMATED = "as they are", "batch norms re-estimated"
FITTED, BOTH = "layers fitted", "layers fitted, batch norms re-estimated"
FORMS = (AS_IT_IS, RE_ESTIMATED, FITTED, BOTH)
JUDGED = 2000  # validation images by which forms of the same student are compared, about
FIT_FROM = 1000  # the first training batch whose images layers are fitted to: first weights have not seen it
FIT_PART = 64  # images that run at a time
FIT_BYTES = 2**30  # of activations that are kept meanwhile

State = Mapping[str, Tensor]


def reconcile(
    context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks, starts: Mapping[str, Mapping[int, State]]
) -> tuple[nn.Module | None, int, dict[str, Any]]:
    """Return the student as it is, with batch norms re-estimated, with layers fitted in closed form, or both: whichever
    is best on validation images, the later of equals; and what was found. `starts` are the units' weights that it may
    have, by what is said of them.

    Every rank must call. Each makes and judges some of the forms; the best one is returned on the rank that has made
    it, whose number is returned too, and none on others.
    """
    ways = [(start, layers) for start in starts for layers in (AS_IT_IS, FITTED)]
    own: dict[str, Hits] = {}
    chosen, best = "", None
    size = images_at_a_time(dataset.image_shape)
    for start, layers in ways[context.rank :: context.world_size]:
        for form, network in _forms(context, dataset, teacher, blocks, starts[start], layers=layers):
            name = start + form
            own[name] = count_hits(network, islice(dataset.validation_batches(size), JUDGED // size))
            if best is None or best_of({"before": own[chosen], "now": own[name]}) == "now":
                chosen, best = name, network
    hits, makers = _of_all(context, own, [start + form for start in starts for form in FORMS])
    whole = best_of(hits) or next(iter(hits))
    found = {
        "chosen": whole,
        "validation_top1": {name: None if one.not_finite else one.percent()["top1"] for name, one in hits.items()},
    }
    return best if makers[whole] == context.rank else None, makers[whole], found


def _of_all(context: Context, own: Mapping[str, Hits], order: Sequence[str]) -> tuple[dict[str, Hits], dict[str, int]]:
    """Return the hits of every form that could be had, in this order, and the ranks that have made them."""
    control = context.control
    control.set(f"forms/{context.rank}", {name: asdict(hits) for name, hits in own.items()})
    found, makers = {}, {}
    for rank in range(context.world_size):
        for name, hits in control.wait(f"forms/{rank}", peer=rank, purpose="forms of the student").items():
            found[name], makers[name] = Hits(**hits), rank
    return {name: found[name] for name in order if name in found}, makers


def _forms(
    context: Context,
    dataset: Dataset,
    teacher: nn.Module,
    blocks: Blocks,
    weights: Mapping[int, State],
    *,
    layers: str,
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the forms of the student that can be had with layers as they are, or fitted, by what was done to it."""
    config = context.config.assemble
    states = list(weights.values())
    if layers == FITTED:
        states = _fitted(context, dataset, blocks, weights, config.refit_images)
        if not states:
            return
    yield layers, _network(context, teacher, blocks, states)
    student = _network(context, teacher, blocks, states)
    if _re_estimated(student, dataset, config.batchnorm_batches):
        yield BOTH if layers == FITTED else RE_ESTIMATED, student


def reconciled(
    context: Context,
    dataset: Dataset,
    teacher: nn.Module,
    blocks: Blocks,
    weights: Mapping[int, State],
    *,
    batches: int,
) -> nn.Module:
    """Return the student with its layers fitted as far as they can be, and its batch norms re-estimated over at most so
    many batches: one of the forms that reconcile() chooses from."""
    config = context.config.assemble
    fitted = _fitted(context, dataset, blocks, weights, config.refit_images)
    student = _network(context, teacher, blocks, fitted or weights.values())
    _re_estimated(student, dataset, min(batches, config.batchnorm_batches))
    return student


def _network(context: Context, teacher: nn.Module, blocks: Blocks, states: Iterable[State]) -> nn.Module:
    student = assemble(teacher, changed=blocks.changed, blocks=states).eval()
    to_channels_last(student, context.device)
    return student


def _re_estimated(student: nn.Module, dataset: Dataset, batches: int) -> bool:
    """Re-estimate the student's batch norms over so many batches; return whether there was anything to do."""
    if batches == 0 or not remembering_norms(student):
        return False
    recalibrate(student, (batch.images for batch in dataset.train_batches(0, batches)))
    return True


def _fitted(
    context: Context, dataset: Dataset, blocks: Blocks, weights: Mapping[int, State], wanted: int
) -> list[State]:
    """Return the units' weights after their layers were fitted, by so many images, to what they get in a row; none
    where none could be."""
    if wanted == 0 or not blocks.chain.divisible:
        return []
    modules = blocks.students(weights)
    for module in modules.values():
        to_channels_last(module, context.device)
    paths = {one.input: one.recipe.paths(one.changes) for one in blocks.candidates.values()}
    images = list(_images(dataset, blocks, wanted))
    gives = {unit.input: partial(narrowed, unit.gives) for unit in blocks.units.values()}
    if refit_in_a_row(blocks.chain, modules, paths, images, gives) == 0:
        return []
    return [modules[blocks.candidates[number].input].state_dict() for number in weights]


def _images(dataset: Dataset, blocks: Blocks, wanted: int) -> Iterator[Tensor]:
    """Yield training images in parts, as many as are wanted as far as their activations have room."""
    largest = max(boundary.nbytes // boundary.shape[0] for boundary in blocks.chain.boundaries)
    left = max(FIT_PART, min(wanted, FIT_BYTES // (2 * largest)))
    step = FIT_FROM
    while left > 0:
        for part in torch.split(dataset.train_batch(step).images, FIT_PART):
            if left > 0:
                yield part[:left]
                left -= len(part)
        step += 1

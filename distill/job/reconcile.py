"""The blocks of a student reconciled: each was trained on the teacher's activations, and now gets what other students
give. Closed forms put right what they can, and validation images say which of them help.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
from distill.student.evaluate import best_of, count_hits, images_at_a_time
from distill.student.refit import refit_in_a_row
from distill.training.channels import narrowed

TRAINED, UNTRAINED = "", "with first weights, "  # what a form's name begins with
AS_IT_IS = "as they are"
JUDGED = 2000  # validation images by which forms of the same student are compared, about
FIT_FROM = 1000  # the first training batch whose images layers are fitted to: first weights have not seen it
FIT_PART = 64  # images that run at a time
FIT_BYTES = 2**30  # of activations that are kept meanwhile

State = Mapping[str, Tensor]


def reconcile(
    context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks, starts: Mapping[str, Mapping[int, State]]
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the student as it is, with batch norms re-estimated, with layers fitted in closed form, or both: whichever
    is best on validation images, the later of equals; and what was found. `starts` are the units' weights that it may
    have, by what is said of them."""
    hits, chosen, best = {}, "", None
    size = images_at_a_time(dataset.image_shape)
    for start, weights in starts.items():
        for form, network in _forms(context, dataset, teacher, blocks, weights):
            name = start + form
            hits[name] = count_hits(network, islice(dataset.validation_batches(size), JUDGED // size))
            if best is None or best_of({"before": hits[chosen], "now": hits[name]}) == "now":
                chosen, best = name, network
    assert best is not None
    return best, {
        "chosen": chosen,
        "validation_top1": {name: None if one.not_finite else one.percent()["top1"] for name, one in hits.items()},
    }


def _forms(
    context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks, weights: Mapping[int, State]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the forms of the student that can be had, by what was done to it."""
    network = partial(_network, context, teacher, blocks)
    batches = context.config.assemble.batchnorm_batches
    yield AS_IT_IS, network(weights.values())
    student = network(weights.values())
    if _re_estimated(student, dataset, batches):
        yield "batch norms re-estimated", student
    fitted = _fitted(context, dataset, blocks, weights, context.config.assemble.refit_images)
    if fitted:
        yield "layers fitted", network(fitted)
        student = network(fitted)
        if _re_estimated(student, dataset, batches):
            yield "layers fitted, batch norms re-estimated", student


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

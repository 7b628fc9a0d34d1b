"""A teacher's logits for fixed views of the training images, found once and kept."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.data import Batch, Dataset
from distill.training.fused_views import fused
from distill.training.objective import Address, Outputs, TeacherOutputs
from distill.training.team import Team

AT_ONCE = 1 << 24  # bytes that ranks exchange in one piece


class KeptLogits:
    """A teacher's outputs that are looked up; it has no taps."""

    def __init__(self, dataset: Dataset, logits: Tensor) -> None:
        """Of a data set with fixed views: (places, classes), in the order of its fixed_batches()."""
        self._dataset, self._logits = dataset, logits

    def outputs(self, batch: Batch, address: Address) -> Outputs:
        places = self._dataset.fixed_places(address.step)[address.part :: address.num_parts]
        return Outputs(self._logits[places].float().to(batch.labels.device), {})

    def fused(self, temperature: float) -> KeptLogits:
        """Return the same with the logits of the mean prediction over all views, softened, in the place of each."""
        views = self._dataset.num_views
        of_each = self._logits.float().view(views, -1, self._logits.shape[1])
        of_all = fused(of_each.unbind(), temperature=temperature)
        return KeptLogits(self._dataset, of_all.repeat(views, 1))

    @property
    def nbytes(self) -> int:
        return self._logits.nbytes


def most_bytes(dataset: Dataset) -> int:
    """Return how many bytes the logits for its classes have at most, while they are found."""
    return dataset.num_views * dataset.num_train * len(dataset.classes) * 4


def keep_logits(dataset: Dataset, teacher: TeacherOutputs, team: Team) -> KeptLogits:
    """Return the teacher's logits for every view, all of them on every rank. Each finds those of a share of batches
    that are the same for any number of ranks. Every rank must call it.

    Where they are numbers of bf16, as those of a teacher in bf16 are, they are kept in two bytes; otherwise in four.
    """
    nowhere = Address(seed=0, step=0)  # the teacher is asked about batches in the set's own order
    sample = teacher.outputs(dataset.train_batch(0, num_parts=dataset.batch_size), nowhere).logits
    logits = torch.zeros(dataset.num_views * dataset.num_train, sample.shape[1])
    for place, batch in dataset.fixed_batches(team.rank, team.world_size):
        found = teacher.outputs(batch, nowhere).logits
        logits[place : place + len(found)] = found.cpu()
    if team.world_size > 1:
        _add_up(logits, team, sample.device)
    rounded = logits.bfloat16()
    return KeptLogits(dataset, rounded if torch.equal(rounded.float(), logits) else logits)


def _add_up(logits: Tensor, team: Team, device: torch.device) -> None:
    """Give every rank what the others have found, in place: a number and zeros, whose sum is the number."""
    others = team.meet()
    try:
        for rows in torch.split(logits, max(1, AT_ONCE // (4 * logits.shape[1]))):
            moved = rows.to(device)
            others([moved])()
            rows.copy_(moved)
    finally:
        others.close()

"""What is counted as right, and which state of the student is delivered for it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from distill.config.compose import compose
from distill.data import Batch, Dataset
from distill.errors import ConfigError
from distill.job.evaluate import refuse_unjudged, warn_of_few_images
from distill.job.finetune import best_epoch, is_exhausted, refuse_ranks_without_rows
from distill.student.evaluate import Hits, best_of, count_hits, first_not_finite, images_at_a_time


def batches(*logits: Tensor, label: int) -> list[Batch]:
    """Batches whose images a network that hands on its input takes for these logits."""
    return [Batch(one, torch.full((len(one),), label)) for one in logits]


class TestCounting:
    def test_first_guess_and_first_five_in_batches_of_any_size(self) -> None:
        logits = torch.tensor([[9.0, 1, 2, 3, 4, 5], [1.0, 9, 2, 3, 4, 5], [0.0, 1, 2, 3, 4, 5]])
        hits = count_hits(nn.Identity(), batches(logits[:2], logits[2:], label=0))
        assert hits == Hits(top1=1, top5=1, images=3)
        assert count_hits(nn.Identity(), batches(logits, label=1)) == Hits(top1=1, top5=2, images=3)

    def test_fewer_than_five_classes_are_all_among_the_first_five(self) -> None:
        hits = count_hits(nn.Identity(), batches(torch.tensor([[1.0, 2.0]]), label=0))
        assert hits == Hits(top1=0, top5=1, images=1)

    def test_logits_that_are_not_finite_are_misses_though_their_first_is_the_largest(self) -> None:
        logits = torch.tensor([[math.nan, 0.0], [math.nan, math.nan], [math.inf, 0.0], [1.0, 0.0]])
        assert count_hits(nn.Identity(), batches(logits, label=0)) == Hits(top1=1, top5=1, images=4, not_finite=3)

    def test_counts_of_ranks_add_up_and_no_image_has_no_percentage(self) -> None:
        total = Hits(1, 2, 3, 1) + Hits(1, 1, 1)
        assert total == Hits(2, 3, 4, 1)
        assert total.percent() == {"top1": 50.0, "top5": 75.0}
        assert Hits().percent() == {"top1": None, "top5": None}

    def test_few_images_are_not_trusted_for_being_all_right(self) -> None:
        assert Hits(6, 6, 6).standard_error == pytest.approx(100 * math.sqrt(7 / 8 * 1 / 8 / 6))
        assert Hits(5000, 5000, 10_000).standard_error == pytest.approx(0.5, rel=1e-3)


class TestChoosing:
    def test_most_hits_win(self) -> None:
        hits = {"assembled": Hits(3, 5, 6), "recalibrated": Hits(5, 5, 6), "finetuned": Hits(4, 6, 6)}
        assert best_of(hits) == "recalibrated"

    def test_the_later_of_equals_wins(self) -> None:
        hits = {"assembled": Hits(5, 5, 6), "recalibrated": Hits(4, 5, 6), "finetuned": Hits(5, 6, 6)}
        assert best_of(hits) == "finetuned"
        assert best_of({"assembled": Hits(), "recalibrated": Hits()}) == "recalibrated"

    def test_what_is_not_finite_never_wins(self) -> None:
        hits = {"assembled": Hits(1, 5, 6), "finetuned": Hits(5, 5, 6, not_finite=1)}
        assert best_of(hits) == "assembled"
        assert best_of({"finetuned": hits["finetuned"]}) is None

    def test_the_best_epoch_is_kept_and_the_later_of_equals(self) -> None:
        course = [{"epoch": n, "validation_top1": top1} for n, top1 in enumerate((80.0, 90.0, 90.0, None, 70.0), 1)]
        assert best_epoch(course) == 3
        assert best_epoch([*course[:1], {"epoch": 2, "loss": None}]) == 1
        assert best_epoch([{"epoch": 1, "loss": None}]) is None

    @pytest.mark.parametrize(
        ("accuracies", "patience", "exhausted"),
        [
            ((80, 70), None, False), ((80, 70), 1, True), ((80, 80), 1, True), ((80, 81), 1, False), ((80,), 1, False),
            ((80, 70, 79), 2, True), ((80, 70, 79, 81), 2, False), ((80, 70, None), 2, True), ((None, 10), 1, False),
        ],
    )  # fmt: skip
    def test_it_ends_after_epochs_in_a_row_that_improved_nothing(
        self, accuracies: tuple[float | None, ...], patience: int | None, exhausted: bool
    ) -> None:
        course = [{"epoch": number, "validation_top1": top1} for number, top1 in enumerate(accuracies, 1)]
        assert is_exhausted(course, patience) == exhausted


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    network.register_buffer("mask", torch.tensor([-math.inf]))
    assert first_not_finite(network) is None
    network[1].running_var.fill_(math.nan)
    assert first_not_finite(network) == "1.running_var"
    network[0].bias.data.fill_(math.inf)
    assert first_not_finite(network) == "0.bias"


def test_one_class_is_refused_and_few_validation_images_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    config = compose(["data=imagefolder", "data.root=pictures", "data.validation_fraction=0.01"])

    def dataset(*classes: str, num_validation: int = 50) -> Dataset:
        facts = SimpleNamespace(classes=classes, num_test=5, num_validation=num_validation)
        return cast(Dataset, facts)

    refuse_unjudged(config, dataset("cat", "dog"))
    with pytest.raises(ConfigError, match=r"data\.root: got '.*pictures'; expected .* 2 classes; there is only images"):
        refuse_unjudged(config, dataset("images"))
    warn_of_few_images(config, dataset("cat", "dog"))
    assert not caplog.records
    warn_of_few_images(config, dataset("cat", "dog", num_validation=6))
    assert "6 images to choose the student by, which says its accuracy to within 20 points" in caplog.text
    assert "raise data.validation_fraction (0.01)" in caplog.text


class TestRanksWithoutRows:
    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["finetune.epochs=1"], "at least 3, an image for each rank that fine-tunes; or fewer ranks, or finetune"),
            (["plan.strategy=ddp", "finetune.epochs=0"], "at least 3, an image for each rank with plan.strategy=ddp"),
        ],
    )
    def test_are_refused(self, overrides: list[str], words: str) -> None:
        config = compose(["data.batch_size=2", *overrides])
        refuse_ranks_without_rows(config, world_size=2)
        with pytest.raises(ConfigError, match=f"^data.batch_size: got 2; expected {words}"):
            refuse_ranks_without_rows(config, world_size=3)

    @pytest.mark.parametrize("overrides", [["finetune.epochs=0"], ["stage=distill"], ["stage=teacher"]])
    def test_are_welcome_where_every_rank_works_on_whole_batches(self, overrides: list[str]) -> None:
        refuse_ranks_without_rows(compose(["data.batch_size=2", *overrides]), world_size=3)


@pytest.mark.parametrize(("shape", "count"), [((3, 32, 32), 100), ((3, 224, 224), 41), ((3, 4096, 4096), 1)])
def test_fewer_images_are_evaluated_at_a_time_where_they_are_large(shape: tuple[int, ...], count: int) -> None:
    assert images_at_a_time(shape) == count

"""Logits of fixed views: those that the teacher gives for a batch, whichever rank has which of its rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distill.config.compose import compose
from distill.data import Batch
from distill.errors import ConfigError
from distill.job.kept_logits import refuse_unkept, with_kept_logits
from distill.training import kept_logits
from distill.training.fused_views import FusedViews
from distill.training.kept_logits import keep_logits, most_bytes
from distill.training.objective import Address, Distillation, TeacherHere
from distill.training.precision import InBf16
from distill.training.team import Team
from tests.opened import opened


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 144, 10)).eval()


def test_what_is_kept_is_what_the_teacher_gives(teacher: nn.Module) -> None:
    with opened() as fresh:
        dataset = fresh.with_views(2)
        source = TeacherHere(teacher, ())
        kept = keep_logits(dataset, source, Team())
        assert kept.nbytes == 2 * dataset.num_train * 10 * 4 == most_bytes(dataset)
        rounded = keep_logits(dataset, InBf16(source), Team())
        assert rounded.nbytes == kept.nbytes // 2, "numbers of bf16 need no more"
        per_epoch = dataset.steps_per_epoch
        for step, part, parts in ((0, 0, 1), (per_epoch + 3, 1, 3), (2 * per_epoch + 1, 0, 2)):
            batch, address = dataset.train_batch(step, part, parts), Address(9, step, part, parts)
            for keeper, own, tolerance in ((kept, source, 1e-4), (rounded, InBf16(source), 2e-2)):
                found = keeper.outputs(batch, address).logits
                assert found.dtype is torch.float32
                torch.testing.assert_close(found, own.outputs(batch, address).logits, rtol=tolerance, atol=tolerance)


def test_fused_they_are_what_is_fused_view_by_view(teacher: nn.Module) -> None:
    with opened() as fresh:
        dataset, source = fresh.with_views(2), TeacherHere(teacher, ())
        kept = keep_logits(dataset, source, Team()).fused(4.0)

        def redrawn(address: Address, number: int) -> Batch:
            return dataset.redrawn(address.step, number, address.part, address.num_parts)

        one_by_one = FusedViews(source, redrawn, num_views=2, temperature=4.0)
        for step in (3, dataset.steps_per_epoch + 5):
            batch, address = dataset.train_batch(step, 1, 3), Address(9, step, 1, 3)
            found = (keeper.outputs(batch, address).logits.softmax(1) for keeper in (kept, one_by_one))
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_ranks_find_a_share_each_and_have_the_bits_of_one(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[torch.Tensor] = []
    with opened() as fresh:
        dataset = fresh.with_views(2)
        alone = keep_logits(dataset, TeacherHere(teacher, ()), Team())
        monkeypatch.setattr(kept_logits, "_add_up", lambda logits, *_: shares.append(logits.clone()))
        for rank in range(3):
            keep_logits(dataset, TeacherHere(teacher, ()), Team(rank=rank, world_size=3))
        assert torch.equal(sum(shares), alone._logits)


def test_too_many_views_are_refused_by_name() -> None:
    config = compose(["finetune.views=3", "finetune.epochs=4", "cache.max_gib=0.0002", "data.augment=crop_flip"])
    with opened() as dataset:
        with pytest.raises(ConfigError, match=r"finetune\.views: got 3; .* cache\.max_gib >= 0\.000289: .* 2 ranks"):
            refuse_unkept(config, dataset, ranks_here=2)
        config.finetune.epochs = 3  # no view is seen twice, so that none is kept
        refuse_unkept(config, dataset, ranks_here=2)


@pytest.mark.parametrize(
    ("overrides", "taps", "told"),
    [
        (["finetune.epochs=1"], (), "1 fixed view, whose logits are not kept: no view is seen twice"),
        (
            ["finetune.epochs=2"],
            ("1",),
            "1 fixed view, whose logits are not kept: the objective sees activations too (1)",
        ),
        (["finetune.soft_weight=0"], (), "1 fixed view, whose logits are not kept: the teacher is not asked"),
    ],
)
def test_what_cannot_be_kept_or_need_not_is_told(overrides: list[str], taps: tuple[str, ...], told: str) -> None:
    said: list[str] = []
    context = SimpleNamespace(config=compose(["finetune.views=1", *overrides]), say=said.append)
    objective = Distillation(temperature=4.0, soft_weight=0.9)
    objective.taps = taps
    source = TeacherHere(nn.Identity(), ())
    with opened() as fresh:
        found = with_kept_logits(context, fresh.with_views(1), source, objective, Team())  # type: ignore[arg-type]
    assert found is source
    assert said == [f"finetune: {told}"]

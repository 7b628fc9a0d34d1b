"""Objectives: what they see of both networks, where they come from, and which are refused before training starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill.config import choices
from distill.data import Batch
from distill.errors import ConfigError
from distill.training.objective import Address, Distillation, Labels, Seen, Tapped, TeacherHere
from distill.training.objectives.making import OBJECTIVES, make_objective, try_out

BATCH = Batch(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1]))
SETTINGS = {"temperature": 4.0, "soft_weight": 0.9}


class Twice(nn.Module):
    """Calls one of its layers twice, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.never, self.pair, self.head = nn.ReLU(), nn.ReLU(), Pair(), nn.Linear(48, 2)

    def forward(self, images: Tensor) -> Tensor:
        one, _ = self.pair(self.again(self.again(images)))
        return self.head(one.flatten(1))


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


def network(*, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(64, 2)
    )


class Attention(Labels):
    """Maps of attention at some places, alike; has options of its own."""

    def __init__(self, at: list[str], weight: float = 1.0) -> None:
        super().__init__()
        self.taps, self.weight = at, weight

    def forward(self, seen: Seen) -> Tensor:
        maps = [
            (seen.student.taps[path].square().mean(1) - seen.teacher.taps[path].square().mean(1)).square().mean()
            for path in self.taps
        ]
        return super().forward(seen) + self.weight * torch.stack(maps).sum()


class Unreduced(Labels):
    def forward(self, seen: Seen) -> Tensor:
        return seen.student.logits


class Constant(Labels):
    def forward(self, seen: Seen) -> Tensor:
        return nn.Parameter(torch.ones(())) * seen.teacher.logits.sum()


class OwnDetached(Labels):
    def own_loss(self, seen: Seen) -> Tensor:
        return seen.student.logits.sum()


class Failing(Labels):
    def forward(self, seen: Seen) -> Tensor:
        return seen.student.taps["nowhere"].sum()


NO_OBJECTIVE = 3


class TestTaps:
    def test_are_the_activations_of_the_network_and_differentiable(self) -> None:
        student = network()
        tapped = Tapped(student, ["1", "2"])
        outputs = tapped(BATCH.images)
        norm = student[1](student[0](BATCH.images))
        assert torch.equal(outputs.taps["1"], norm)
        assert torch.equal(outputs.taps["2"], norm.relu())
        assert torch.equal(outputs.logits, student(BATCH.images))
        (gradient,) = torch.autograd.grad(outputs.taps["2"].sum(), [student[0].weight], retain_graph=True)
        assert gradient.abs().sum() > 0
        assert not outputs.detached().taps["2"].requires_grad
        assert not any(module._forward_hooks for module in student.modules())

    def test_of_the_teacher_are_found_when_asked_for_once_and_without_gradients(self) -> None:
        passes: list[object] = []
        teacher = network().eval()
        teacher.register_forward_hook(lambda *_: passes.append(1))
        tapped = Tapped(network(), ["2"])
        seen = Seen(tapped(BATCH.images), BATCH, Address(seed=0, step=3), TeacherHere(teacher, ["2"]))
        assert not passes
        assert torch.equal(seen.teacher.taps["2"], teacher[:3](BATCH.images))
        assert seen.detached().teacher is seen.teacher
        assert not seen.teacher.taps["2"].requires_grad
        assert len(passes) == 1

    @pytest.mark.parametrize(
        ("model", "path", "words"),
        [
            (network(), "9", "taps that are modules: one of 0, 1, 2, 3, 4"),
            (network(), "", "taps that are modules"),
            (network(inplace=True), "1", "changed in place"),
            (Twice(), "again", "run once"),
            (Twice(), "never", "taps that the network runs"),
            (Twice(), "pair", "return a tensor.*tuple"),
        ],
    )
    def test_that_cannot_be_had_are_refused(self, model: nn.Module, path: str, words: str) -> None:
        with pytest.raises(ConfigError, match=words) as caught:
            Tapped(model, [path])(BATCH.images)
        assert caught.value.setting == "finetune.objective"


class TestMaking:
    def test_own_ones_have_the_names_of_the_configuration(self) -> None:
        assert (*OBJECTIVES,) == choices.OBJECTIVES

    def test_settings_are_given_to_what_takes_them_and_options_to_all(self) -> None:
        made = make_objective("distillation", options={}, settings=SETTINGS)
        assert isinstance(made, Distillation)
        assert (made.temperature, made.soft_weight) == (4.0, 0.9)
        made = make_objective(f"{__name__}:Attention", options={"at": ["1"]}, settings=SETTINGS)
        assert made.taps == ["1"]

    @pytest.mark.parametrize(
        ("name", "options", "words"),
        [
            ("Attention", {}, r"finetune\.options: .* arguments that are taken \(missing a required argument: 'at'"),
            ("Attention", {"at": [], "wieght": 1}, "unexpected keyword argument 'wieght'"),
            ("NO_OBJECTIVE", {}, r"finetune\.objective: .* derives from distill\.training\.objective\.Objective"),
            ("network", {}, "a class that derives"),
        ],
    )
    def test_what_cannot_be_made_is_refused(self, name: str, options: dict[str, object], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            make_objective(f"{__name__}:{name}", options=options, settings=SETTINGS)


class TestTryingOut:
    def test_one_that_can_train_passes_and_networks_stay_as_they_are(self) -> None:
        student, teacher = network().eval(), network().eval()
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        try_out(Attention(["2"]), "Attention", student=student, teacher=teacher, batch=BATCH)
        assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
        assert all(parameter.grad is None for parameter in student.parameters())

    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            (Unreduced, r"a scalar tensor as the loss.*returns a tensor of \(2, 2\)"),
            (Constant, "depends on the student's outputs"),
            (OwnDetached, r"OwnDetached.own_loss.*a loss with a gradient"),
            (Failing, r"runs on a batch \(KeyError: 'nowhere'; test_objective.py, line \d+\)"),
        ],
    )
    def test_one_that_cannot_is_refused_by_name(self, kind: type[Labels], words: str) -> None:
        with pytest.raises(ConfigError, match=words) as caught:
            try_out(kind(), kind.__name__, student=network(), teacher=network(), batch=BATCH)
        assert caught.value.setting == "finetune.objective"

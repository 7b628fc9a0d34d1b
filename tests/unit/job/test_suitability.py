"""Networks that can have no students, and those that cannot take the images: who is told what is to blame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distill.blocks.cut import Granularity, cut
from distill.config.compose import compose
from distill.errors import ConfigError
from distill.job import teacher as materials
from distill.job.suitability import refuse_unshrinkable
from distill.teachers import build_architecture


class _Classes:
    classes = tuple("abcdefghij")
    image_shape = (3, 32, 32)


@pytest.mark.parametrize("name", ["vit_b_16", "mobilenet_v2", "swin_t"])
def test_what_no_recipe_can_shrink_is_refused_before_its_weights_are_read(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(materials, "load_teacher_weights", read)
    monkeypatch.setattr(materials, "build_architecture", _small)
    config = compose(["teacher=torchvision", f"teacher.name={name}"])
    with pytest.raises(ConfigError, match=f"teacher.name: got '{name}'.*student.recipe=separable") as caught:
        materials.build_teacher(config, _Classes(), torch.device("cpu"))  # type: ignore[arg-type]
    assert "student.first_layer=true" in str(caught.value)


def _small(**facts: Any) -> nn.Module:
    """The network on the meta device, where building is quick."""
    with torch.device("meta"):
        return build_architecture(**facts)


def test_a_network_of_ones_own_is_named_by_its_factory_and_may_have_its_first_layer_replaced() -> None:
    config = compose(["teacher=custom", "teacher.factory=a.b:c"])
    for network in (nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4))):
        with pytest.raises(ConfigError, match=r"teacher\.factory: got 'a\.b:c'"):
            refuse_unshrinkable(config, network)
    refuse_unshrinkable(compose(["student.first_layer=true"]), nn.Sequential(nn.Conv2d(3, 4, 3)))
    refuse_unshrinkable(compose(["stage=teacher"]), nn.Linear(1, 1))


def test_the_image_size_is_not_blamed_for_a_network_of_other_channels() -> None:
    sample = torch.zeros(2, 3, 28, 28)
    with pytest.raises(
        ConfigError, match=r"teacher: got '1 channel'; expected .* for images of 3 channels.*its 0 takes"
    ):
        cut(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU()), sample, granularity=Granularity.conv)
    with pytest.raises(ConfigError, match=r"teacher: got '5 channels'.*its 1 takes 5 and is given 8"):
        cut(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(5, 8, 3)), sample, granularity=Granularity.conv)
    with pytest.raises(ConfigError, match=r"data.image_size"):
        cut(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(9, 2)), sample, granularity=Granularity.conv)

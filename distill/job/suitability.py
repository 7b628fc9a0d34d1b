"""Whether a network can have students at all: seen before its weights are downloaded and data goes through it."""

from __future__ import annotations

from torch import nn

from distill.config.choices import Stage, TeacherSource
from distill.config.schema import JobConfig
from distill.errors import ConfigError
from distill.recipes import RECIPES


def refuse_unshrinkable(config: JobConfig, network: nn.Module) -> None:
    """Raise ConfigError on what names the network where the recipe finds no layer in it to replace.

    Which of them a student may have is seen when the network is cut; this sees that there is none.
    """
    if config.stage is Stage.teacher:
        return
    student, teacher = config.student, config.teacher
    recipe = RECIPES[student.recipe.name](rank=student.rank, init=student.init.name)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    replaced = [module for module in convolutions if recipe.replaces(module)]
    if replaced and (student.first_layer or replaced != convolutions[:1]):
        return
    is_factory = teacher.source is TeacherSource.factory
    setting, name = ("teacher.factory", teacher.factory) if is_factory else ("teacher.name", teacher.name)
    found = "has none but its first layer, which student.first_layer=true would replace" if replaced else "has none"
    raise ConfigError(
        setting,
        name,
        f"a network with what student.recipe={student.recipe.name} replaces, dense convolutions larger than 1 x 1, as "
        f"ResNets and VGGs have them; this one {found}",
    )

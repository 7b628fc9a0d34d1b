"""Whether a network can have students at all: seen before its weights are downloaded and data goes through it."""

from __future__ import annotations

from torch import nn

from distill.config.choices import Stage, TeacherSource
from distill.config.schema import JobConfig
from distill.errors import ConfigError
from distill.job.recipes import recipe_of


def refuse_unshrinkable(config: JobConfig, network: nn.Module) -> None:
    """Raise ConfigError on what names the network where the recipe finds no layer in it to replace.

    Which of them a student may have is seen when the network is cut; this sees that there is none. Where recipes are
    chosen under budgets, all of that is seen when candidates are tried.
    """
    if config.stage is Stage.teacher or config.search.on:
        return
    student, teacher = config.student, config.teacher
    recipe = recipe_of(config).recipe
    if student.per_block or recipe.suits(network, first_layer=student.first_layer):
        return
    is_factory = teacher.source is TeacherSource.factory
    setting, name = ("teacher.factory", teacher.factory) if is_factory else ("teacher.name", teacher.name)
    only_first = recipe.suits(network, first_layer=True)
    found = "has none but its first layer, which student.first_layer=true would replace" if only_first else "has none"
    raise ConfigError(
        setting,
        name,
        f"a network with what student.recipe={student.recipe} replaces, {recipe.replaces}, as ResNets and VGGs have "
        f"them; this one {found}",
    )

"""Which recipe makes the student of which block: from the settings of the section student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, get_type_hints

from distill.config.outside import RECIPE
from distill.config.schema import JobConfig, StudentConfig
from distill.errors import ConfigError, one_of
from distill.extensions import named
from distill.recipes import RECIPES, Keep, Recipe
from distill.search.pool import DEFAULT


@dataclass(frozen=True)
class Named:
    """A recipe, the name by which student.json finds its class again, and what it is called beside others."""

    name: str
    recipe: Recipe
    label: str = ""


def recipe_of(config: JobConfig) -> Named:
    """Return the recipe of the blocks that student.per_block does not name."""
    return _make("student", config.student.recipe, _given(config.student))


def recipes_of(config: JobConfig, blocks: Sequence[str]) -> dict[str, Named]:
    """Return every block's recipe, by its name: the last pattern of student.per_block that matches it decides, with
    the options of student.options where the recipe is the same. Raises ConfigError naming the setting."""
    usual = recipe_of(config)
    found = dict.fromkeys(blocks, usual)
    for pattern, entry in config.student.per_block.items():
        setting = f"student.per_block.{pattern}"
        if not isinstance(entry, Mapping):
            raise ConfigError(setting, entry, "a mapping of a recipe and its options: {recipe: one_conv, kernel: 3}")
        matching = [block for block in blocks if fnmatchcase(block, pattern)]
        if not matching:
            raise ConfigError(
                "student.per_block", pattern, f"a pattern that matches a block: {one_of(blocks, pattern)}"
            )
        options = dict(entry)
        name = str(options.pop("recipe", usual.name))
        own = {**(_given(config.student) if name == usual.name else {}), **options}
        found |= dict.fromkeys(matching, _make(setting, name, own))
    return found


def candidates_of(config: JobConfig, blocks: Sequence[str]) -> dict[str, list[Named]]:
    """Return for every block, by its name, the recipes that are tried on it, in the order of search.candidates. Raises
    ConfigError naming the setting."""
    found: dict[str, list[Named]] = {block: [] for block in blocks}
    for number, entry in enumerate(config.search.candidates or DEFAULT):
        setting = f"search.candidates[{number}]"
        options = {key: value for key, value in entry.items() if key not in ("recipe", "blocks")}
        name, pattern = entry["recipe"], entry.get("blocks", "*")
        matching = [block for block in blocks if fnmatchcase(block, pattern)]
        if not matching:
            allowed = f"a pattern that matches a block: {one_of(blocks, pattern)}"
            raise ConfigError(f"{setting}.blocks", pattern, allowed)
        one = _make(setting, name, {**_usual(config.student, _class(f"{setting}.recipe", name)), **options})
        if not isinstance(one.recipe, Keep):  # which every block may be, asked for or not
            label = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
            for block in matching:
                found[block].append(replace(one, label=label))
    return found


def rebuilt(name: str, options: Mapping[str, Any]) -> Recipe:
    """Return the recipe of that name with all of its options."""
    return _class("search.candidates", name)(**options)


def _usual(student: StudentConfig, kind: type[Recipe]) -> dict[str, Any]:
    """Return the settings that hold for all recipes that have such an option."""
    usual = {"init": student.init.name, "align": student.align}
    known = {field.name for field in fields(kind)}
    return {name: value for name, value in usual.items() if name in known and value is not None}


def _given(student: StudentConfig) -> dict[str, Any]:
    """Return the options that the section gives: student.rank, init and align to recipes that have them."""
    kind = _class("student.recipe", student.recipe)
    rank = {"rank": student.rank} if student.rank is not None and "rank" in {one.name for one in fields(kind)} else {}
    return rank | _usual(student, kind) | dict(student.options)


def _make(section: str, name: str, options: Mapping[str, Any]) -> Named:
    kind = _class("student.recipe" if section == "student" else f"{section}.recipe", name)
    where = "student.options" if section == "student" else section
    hints, known = get_type_hints(kind), {field.name: field for field in fields(kind)}
    for option, value in options.items():
        if option not in known:
            what = one_of(list(known), option) if known else "no options at all"
            raise ConfigError(f"{where}.{option}", value, f"an option of the recipe {name}: {what}")
        wanted = hints[option]
        number = type(value) is int and isinstance(float(value), wanted)  # 1 for 1.0
        if not (isinstance(value, wanted) or number) or (isinstance(value, bool) and wanted is not bool):
            about = known[option].metadata.get("help", "")
            raise ConfigError(f"{where}.{option}", value, f"{getattr(wanted, '__name__', wanted)} ({about})")
    return Named(name, kind(**options))


def _class(setting: str, name: str) -> type[Recipe]:
    kind = named(setting, name, RECIPES, RECIPE.group)
    if not (isinstance(kind, type) and issubclass(kind, Recipe)):
        raise ConfigError(setting, name, "a class derived from distill.recipes.Recipe")
    return kind

"""The settings whose value may come from outside (see distill/extensions.py): their own names, the groups of entry
points, the folder that the user's code is imported from, and what decides what it computes."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distill.config.choices import BLOCK_LOSSES, OBJECTIVES, RECIPES
from distill.config.sources import describe_module, import_folder
from distill.extensions import module_of, refuse_unknown


@dataclass(frozen=True)
class Door:
    """A setting by its section and name, the values that are the package's own, and the group of entry points."""

    section: str
    name: str
    own: Collection[str]
    group: str

    @property
    def setting(self) -> str:
        return f"{self.section}.{self.name}"

    def check(self, value: str, setting: str | None = None) -> None:
        """Raise ConfigError unless the value is a name that there is, or has the form of one from outside; on another
        `setting` where it is not the door's own that has it."""
        refuse_unknown(setting or self.setting, value, self.own, self.group)

    def module(self, value: object) -> str | None:
        """Return the module that the value is imported from; None for the package's own, and for none."""
        return module_of(value, self.own, self.group) if isinstance(value, str) else None

    def modules_in(self, plain: Mapping[str, Any]) -> dict[str, str]:
        """Return the modules that a configuration of plain values needs for it, by the settings that name them."""
        section = plain.get(self.section)
        values = {self.setting: section.get(self.name)} if isinstance(section, dict) else {}
        for pattern, entry in _per_block(section).items():
            values[f"{self.section}.per_block.{pattern}.{self.name}"] = entry.get(self.name)
        if self.group == "distill.recipes":
            values |= {f"search.candidates[{number}].recipe": name for number, name in _searched(plain)}
        return {setting: module for setting, value in values.items() if (module := self.module(value))}


LOSS = Door("distill", "loss", BLOCK_LOSSES, "distill.losses")
OBJECTIVE = Door("finetune", "objective", OBJECTIVES, "distill.objectives")
DATA = Door("data", "factory", (), "distill.data")
RECIPE = Door("student", "recipe", RECIPES, "distill.recipes")
TEACHER = Door("teacher", "factory", (), "distill.teachers")  # has a folder of its own, teacher.folder
DOORS = (LOSS, OBJECTIVE, DATA, RECIPE)


def code_folder(plain: Mapping[str, Any]) -> str | None:
    """Return the folder that a configuration of plain values has its code from; None where all is installed."""
    return next((folder for module in _modules(plain).values() if (folder := import_folder(module))), None)


def make_importable(folder: str | None) -> None:
    """Let Python import from the folder, before any other."""
    if folder is not None and folder not in sys.path[:1]:
        sys.path.insert(0, folder)


def sources(plain: Mapping[str, Any], folder: str | None) -> dict[str, str | None]:
    """Return, for every setting whose value comes from outside, what its source consists of."""
    return {f"{setting} (source)": describe_module(module, folder) for setting, module in _modules(plain).items()}


def _modules(plain: Mapping[str, Any]) -> dict[str, str]:
    return {setting: module for door in DOORS for setting, module in door.modules_in(plain).items()}


def _searched(plain: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
    """Yield the recipes that are candidates, by their numbers."""
    section = plain.get("search")
    for number, entry in enumerate((section.get("candidates") if isinstance(section, Mapping) else None) or ()):
        if isinstance(entry, Mapping):
            yield number, entry.get("recipe")


def _per_block(section: object) -> dict[str, Mapping[str, Any]]:
    """Return the entries of a section that says something else for some blocks."""
    entries = section.get("per_block") if isinstance(section, Mapping) else None
    return {key: entry for key, entry in (entries or {}).items() if isinstance(entry, Mapping)}

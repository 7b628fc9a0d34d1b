"""From errors of OmegaConf and Hydra to ConfigErrors that name the setting, what was given and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue

from distill.errors import ConfigError, UnknownSettingError, install, one_of

_WORDS = {
    "int": "an integer", "int | None": "an integer, or null", "float": "a number", "float | None": "a number, or null",
    "str": "a text", "str | None": "a text, or null", "bool": "true or false",
    "bool | None": "true or false, or null", "list[str]": "a list, such as [a,b]",
    "list[float]": "a list of numbers, such as [1,2,3]",
    "list[float] | None": "a list of numbers, such as [1,2,3], or null",
}  # fmt: skip


def explain(error: BaseException, kinds: Mapping[str, str], overrides: Sequence[str] = ()) -> ConfigError:
    """Return the ConfigError for an error of OmegaConf or Hydra, with the nearest setting where one was misspelt.

    `kinds` are the types of all settings by dotted path; `overrides` are what the user typed, to quote from.
    """
    while not getattr(error, "full_key", None) and error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    choice = re.search(r"Could not find '((?:hydra/)?[^'/]+)/([^']+)'", text)
    if choice:
        group, given = choice.groups()
        available = re.findall(r"^\t(\S+)$", text, flags=re.MULTILINE)
        extra = f"; submitit_slurm comes with the extra slurm: {install('slurm')}"
        lacking = group == "hydra/launcher" and "submitit_slurm" not in available
        return ConfigError(group, given, _of_registries(group, given) + one_of(available, given) + extra * lacking)
    several = re.search(r"Ambiguous value for argument '([^=']+)=([^']*)'", text)
    if several:
        return ConfigError(several[1], several[2], "one value; several make a sweep with --multirun, [a,b] is a list")
    found = re.search(r"Could not (?:override|append to config[^']*) '([^'=]+)", text)
    key = str(getattr(error, "full_key", None) or (found.group(1) if found else "")).lstrip("+")
    key = re.sub(r"\[\d+\]$", "", key)  # an element of a list is not a setting of its own
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(key, "???", "a value: this setting has no default here")
    if isinstance(error, InterpolationResolutionError):
        return ConfigError(key, text.splitlines()[0], "${...} that names a setting; \\${ stands for the characters ${")
    typed = {name.lstrip("+"): value for name, _, value in (override.partition("=") for override in overrides)}
    quoted = re.search(r"[Vv]alue '([^']*)'", text)
    if not key:
        return ConfigError("command line", text.splitlines()[0], "group=choice or setting=value; see --help")
    return refused(key, typed.get(key, quoted.group(1) if quoted else text.splitlines()[0]), kinds)


def _of_registries(group: str, given: str) -> str:
    """Return how to name a network that is no choice of its own but one of a registry's, with "or" after it."""
    if group != "teacher":
        return ""
    from distill.teachers import registries_of  # imports torch

    return "".join(
        f"teacher={source} teacher.name={given}, or " for source in registries_of(given) if source != "cifar"
    )


def refused(key: str, given: str, kinds: Mapping[str, str]) -> ConfigError:
    """Return the error for a value that the setting `key` cannot take, or for a key that is no setting."""
    if key in kinds:
        choices = kinds[key].split(" or ")
        return ConfigError(key, given, one_of(choices, given) if choices[1:] else _WORDS.get(kinds[key], kinds[key]))
    if key.rpartition(".")[0] in kinds:
        return ConfigError(key, given, f"+{key}={given}: what is not in the schema is added with a plus sign")
    if key.startswith("hydra."):
        return ConfigError(key, given, "a setting of Hydra; those of hydra.launcher come with a hydra/launcher=choice")
    within = [path for path in kinds if path.startswith(f"{key}.")]
    if within:
        return ConfigError(key, given, f"its settings one by one: {', '.join(within)}")
    of_that_name = [path for path in kinds if path.endswith(f".{key}")]
    if of_that_name:
        return UnknownSettingError(key, one_of(of_that_name))
    return UnknownSettingError(key, one_of(_neighbours(key, list(kinds)), key))


def _neighbours(key: str, paths: list[str]) -> list[str]:
    """The settings of the section that `key` names, or all sections where it names none."""
    section = key.rsplit(".", 1)[0] + "."
    return [path for path in paths if path.startswith(section)] or sorted({path.split(".")[0] for path in paths})

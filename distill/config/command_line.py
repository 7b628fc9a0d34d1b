"""What is typed on a command line, put into Hydra's grammar: texts as they are typed, mistakes in words of our own.

Hydra reads `=`, commas, brackets, spaces and more in a value as signs of its grammar; file names have them too. So a
setting that is a text (paths, names) is quoted for Hydra. Quotes of the user's own and ${...} mean what they do there,
and commas separate values in sweeps alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf.errors import GrammarParseError
from omegaconf.grammar_parser import parse as interpolation

from distill.config.errors import refused
from distill.config.load import literal
from distill.config.reference import setting_kinds
from distill.config.schema import MAPPINGS
from distill.errors import ConfigError, DistillError

SEARCH_PATH = "hydra.searchpath"  # the one setting of Hydra's that every command minds: folders of one's own choices
TEXTS = ("str", "str | None")
FLAGS = ("--help", "--version", "--cfg", "--multirun")
VERBS: Mapping[str, str] = {
    "report": "draws the page of a run again, or compares several",
    "simulate": "imagines a job on other clusters",
    "jobs": "lists the jobs of a sweep",
    "slurm": "says where the batch scripts are",
}
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # what documents and chats make of - and --
_FUNCTION = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag)\(.*\)", re.DOTALL)  # of Hydra, for sweeps
_ESCAPED = re.compile(r"[\\()\[\]{}:=,\s]")  # what Hydra writes with a backslash when it repeats a text without quotes
_KEY = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[^=@]*)(?P<package>@[^=]*)?")


def overrides(words: Sequence[str], *, groups: Collection[str], sweep: bool = False) -> list[str]:
    """Return the words of a command line as overrides that Hydra reads as they were meant.

    `groups` are those with choices. Raises ConfigError for a word that is neither a setting nor a group with a value.
    """
    kinds = setting_kinds()
    words = [word for word in words if word.strip()]  # a variable of the shell that is empty
    for position, word in enumerate(words):
        if word[0] in f"-={DASHES}" or ("=" not in word and word[0] != "~"):
            following = words[position + 1] if position + 1 < len(words) else None
            raise _no_override(word, following, kinds, groups)
    return [_override(word, kinds, groups, sweep=sweep) for word in words]


def unquoted(value: str) -> str:
    """Return a text without the quotes that Hydra would take off; any other is returned as it is."""
    found = _hydras_reading(value)
    return found.text if isinstance(found, QuotedString) else value


def _override(word: str, kinds: Mapping[str, str], groups: Collection[str], *, sweep: bool) -> str:
    key = key_of(word)
    if word.startswith(key) and any(f"{key}.".startswith(f"{mapping}.") for mapping in MAPPINGS):
        word = f"++{word}"  # what a mapping has not yet, Hydra adds under this sign alone
    left, is_set, value = word.partition("=")
    if not is_set:  # ~key
        if key in kinds:
            raise ConfigError("command line", word, f"{key}=VALUE: a setting has always a value")
        return word
    if key in groups and value.lower() == "null":
        raise ConfigError(key, value, f"a choice; for none, leave {key}= out")
    if is_hydras(key) and not sweep and key != SEARCH_PATH:
        where = "run.dir=PATH says where results go" if key.endswith(".dir") else "such settings are for sweeps"
        raise ConfigError(key, value, f"--multirun beside it: {where}")
    if kinds.get(key) in TEXTS or key in groups or key == "run":
        if not value:
            allowed = "a value after the = (is a variable of the shell empty?); null stands for none"
            raise ConfigError(key, "", allowed)
        return f"{left}={_texts(value) if sweep else _text(value)}"
    if value.lower() == "null" or _hydras_reading(value) is not None:
        return word
    if key not in kinds and key.rpartition(".")[0] in kinds:  # a keyword of the architecture
        return f"{left}={_text(value)}"
    raise refused(key, value, kinds)


def is_hydras(key: str) -> bool:
    """Whether a key says how Hydra launches jobs, not what they are."""
    return re.match(r"hydra([./]|$)", key) is not None


def key_of(word: str) -> str:
    """Return the setting or group that an override names."""
    found = _KEY.match(word)
    assert found is not None
    return found["key"]


def _texts(value: str) -> str:
    """Return the values of a sweep over texts: commas separate, except within quotes and behind a backslash."""
    if _FUNCTION.fullmatch(value):
        return value
    parts = re.findall(r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\\.|[^,\\])+""", value, flags=re.DOTALL)
    return ",".join(_text(part.replace("\\,", ",")) for part in parts)


def _text(value: str) -> str:
    """Return a text so that Hydra reads what was typed: unchanged where it does so anyway, else in quotes."""
    found = _hydras_reading(value)
    plain = found == value and not _ESCAPED.search(value)
    if isinstance(found, QuotedString) or plain or value.lower() == "null":
        return value
    return QuotedString(value if _interpolates(value) else literal(value), Quote.single).with_quotes()


def _interpolates(value: str) -> bool:
    """Whether every ${ of a text begins an interpolation, and not the name of a file."""
    try:
        interpolation(value)
    except GrammarParseError:
        return False
    return True


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _hydras_reading(value: str) -> Any:
    """Return what Hydra's grammar makes of a value; None where it is none, and of null."""
    try:
        return _parser().parse_override(f"key={value}")._value  # value() would take the quotes off
    except (HydraException, ValueError):
        return None


def _no_override(word: str, following: str | None, kinds: Mapping[str, str], groups: Collection[str]) -> DistillError:
    """The error for a word that gives no setting a value."""
    bare = word.lstrip("-" + DASHES)
    if word[0] in f"-{DASHES}":
        if key_of(bare) in {*kinds, *groups}:
            return ConfigError("command line", word, f"{_with_value(bare, following)}: settings take no dashes")
        if set(word) & set(DASHES):
            plain = re.sub(f"[{DASHES}]", "-", word)
            return ConfigError("command line", word, f"plain dashes, as in {plain}; these are typographic ones")
        near = difflib.get_close_matches(word, FLAGS, n=1)
        hint = f"{near[0]!r} (the nearest), or " if near else ""
        return ConfigError("command line", word, f"{hint}setting=value, group=choice, or one of {', '.join(FLAGS)}")
    if word in {*kinds, *groups}:
        return DistillError(f"{word}: got no value; expected {_with_value(word, following)}, no spaces around the =")
    near = difflib.get_close_matches(word, [*VERBS, *kinds, *groups], n=1)
    hint = f"{near[0]!r} (the nearest), " if near else ""
    allowed = (
        f"{hint}setting=value, group=choice, or a command such as report (see --help); a value with spaces is quoted "
        'for the shell: "data.root=/my images"'
    )
    return ConfigError("command line", word, allowed)


def _with_value(word: str, following: str | None) -> str:
    """The override that was probably meant."""
    if "=" in word:
        return word
    return f"{word}={following}" if following and "=" not in following else f"{word}=VALUE"

"""Which jobs a sweep consists of: the overrides of every job, with the tag that keeps its run directory its own.

Hydra's own grammar and product decide that; nothing is run or written here, and torch is not known.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config.command_line import is_hydras
from distill.config.command_line import overrides as in_hydras_words
from distill.config.compose import VERSION_BASE, config_dir, groups, register_schema
from distill.config.errors import explain
from distill.config.fingerprint import in_fingerprint
from distill.config.reference import setting_kinds
from distill.errors import ConfigError, DistillError

LONGEST_TAG = 120  # file names end at 255 bytes, and the fingerprint comes before the tag


@dataclass(frozen=True)
class Sweep:
    """The jobs of a sweep, in the order of Hydra's product.

    `jobs` are the overrides of each job without those of Hydra; `swept` those of them that several values were given
    for. `launching` are the overrides of Hydra: how jobs are launched, not what they are. `arguments` is all that was
    typed, in Hydra's grammar.
    """

    jobs: list[list[str]]
    swept: list[list[str]]
    launching: list[str]
    arguments: list[str]

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that name these jobs, however they are launched."""
        return hashlib.sha256(json.dumps(self.jobs).encode()).hexdigest()[:12]


@contextmanager
def hydra_ready() -> Iterator[GlobalHydra]:
    """Hydra with this project's configuration; its errors and OmegaConf's become ConfigErrors."""
    register_schema()
    try:
        with initialize_config_dir(config_dir(), job_name="distill", version_base=VERSION_BASE):
            yield GlobalHydra.instance()
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, setting_kinds()) from error


def read_sweep(arguments: Sequence[str]) -> Sweep:
    """Return the jobs that these overrides (and hydra.sweeper.params of an experiment) ask for.

    Raises ConfigError where the overrides cannot be read or what all jobs share cannot be composed.
    """
    arguments = in_hydras_words(arguments, groups=groups(), sweep=True)
    with hydra_ready() as ready:
        master = compose_master(ready, arguments)
        listed = cast(dict[str, Any], OmegaConf.to_container(master.hydra.sweeper.get("params") or OmegaConf.create()))
        parser = OverridesParser.create(config_loader=ready.config_loader())
        of_file = [f"{key}={values}" for key, values in listed.items()]
        overrides = parser.parse_overrides(in_hydras_words(of_file, groups=groups(), sweep=True) + arguments)
        own = [override for override in overrides if not is_hydras(override.key_or_group)]
        jobs = BasicSweeper.split_arguments(own, None)[0]
    keys = _swept_keys(overrides)
    swept = [[override for override in job if override.partition("=")[0] in keys] for job in jobs]
    named = {override.key_or_group for override in own}
    if not named & {"run", "run.tag", "run.dir"}:
        jobs = [job + _tag(override for override in chosen) for job, chosen in zip(jobs, swept, strict=True)]
    launching = [str(override.input_line) for override in overrides if is_hydras(override.key_or_group)]
    return Sweep(jobs, swept, launching, arguments)


def compose_master(ready: GlobalHydra, arguments: Sequence[str]) -> DictConfig:
    """Return the configuration of what all jobs share, with Hydra's own part; what is swept is left out."""
    assert ready.hydra is not None
    return ready.hydra.compose_config("job", list(arguments), run_mode=RunMode.MULTIRUN, with_log_configuration=False)


def _swept_keys(overrides: Sequence[Override]) -> set[str]:
    """The keys, as they are typed, that take several values."""
    keys = set()
    for override in overrides:
        if override.is_sweep_override():
            if is_hydras(override.key_or_group):
                raise ConfigError(override.key_or_group, "several values", "one value: it is not a setting of the job")
            keys.add(override.get_key_element())
    return keys


def _tag(chosen: Iterator[str]) -> list[str]:
    """The override that names a job's choice among settings that say how it runs, not what it computes.

    Jobs that differ in those alone have one fingerprint, and would meet in one run directory.
    """
    parts = []
    for override in chosen:
        key, _, value = override.lstrip("+").partition("=")
        if not in_fingerprint(key) and not key.startswith("run."):
            parts.append(re.sub(r"[^A-Za-z0-9_.]+", "-", f"{key}-{value}").strip("-"))
    tag = "_".join(parts)
    if len(tag) > LONGEST_TAG:
        tag = f"{tag[: LONGEST_TAG - 9]}-{hashlib.sha256(tag.encode()).hexdigest()[:8]}"
    return [f"run.tag={tag}"] if tag else []


def list_jobs(arguments: Sequence[str]) -> int:
    """`python -m distill jobs OVERRIDES [--job N]`: print every job's overrides, or job N's; return the exit status.

    One line a job, quoted for a shell.
    """
    parser = argparse.ArgumentParser(
        prog="distill jobs", description="Print the jobs of a sweep: one line of overrides each, quoted for a shell."
    )
    parser.add_argument("--job", type=int, metavar="N", help="only job N; the first is 0")
    parser.add_argument("overrides", nargs="*", help="as for --multirun, for example student.rank=1,2,4")
    options = parser.parse_intermixed_args(arguments)
    try:
        jobs = read_sweep(options.overrides).jobs
    except DistillError as error:
        sys.stderr.write(f"distill: {error}\n")
        return 2
    if options.job is not None:
        if not 0 <= options.job < len(jobs):
            count = f"{len(jobs)} job{'s' * (len(jobs) != 1)}"
            sys.stderr.write(f"distill: --job {options.job}: this sweep has {count}: --array=0-{len(jobs) - 1}\n")
            return 2
        jobs = [jobs[options.job]]
    for job in jobs:
        sys.stdout.write(shlex.join(job) + "\n")
    return 0

"""Hydra's part: from the command line to a JobConfig, once per job and in one process. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distill.config.choices import Stage
from distill.config.command_line import overrides as in_hydras_words
from distill.config.command_line import unquoted
from distill.config.errors import explain
from distill.config.load import from_yaml, load
from distill.config.reference import setting_kinds
from distill.config.schema import JobConfig, LaunchConfig
from distill.config.shipped import shipped
from distill.errors import ConfigError
from distill.storage.files import DamagedFileError, read_commented
from distill.storage.paths import expanded

VERSION_BASE = "1.3"
RUN = "run="  # the shorthand for a run directory; `run` itself is a section and takes no value


def config_dir() -> str:
    """Return the folder of the YAML files: inside the installed package, or beside it in a checkout."""
    return str(shipped("conf"))


def register_schema() -> None:
    """Make the schema known to Hydra as `job_schema`, which conf/job.yaml starts from, and what YAML files call."""
    ConfigStore.instance().store(name="job_schema", node=JobConfig)
    OmegaConf.register_new_resolver("port_for", _port_for, replace=True)
    OmegaConf.register_new_resolver("is_zero", lambda number: int(number) == 0, replace=True)


def _port_for(job: str, restart: str) -> int:
    """Return the port that a job's launchers meet at, as slurm/distill.sbatch has it: another one for each restart.

    It is below those that systems hand out by themselves, and another one for a node's jobs. The numbers come as
    text: they are variables of the environment.
    """
    return 20_000 + (int(job) * 8 + int(restart) % 8) % 10_000


def compose(overrides: Sequence[str]) -> JobConfig:
    """Return the configuration of the main job with these overrides.

    `run=DIR` starts from the configuration of the run in DIR, instead of from conf/. Raises ConfigError naming the
    setting, what was given and what is allowed.
    """
    runs = [unquoted(override.removeprefix(RUN)) for override in overrides if override.startswith(RUN)]
    overrides = in_hydras_words([override for override in overrides if not override.startswith(RUN)], groups=groups())
    if runs:
        return _compose_from_run(runs[-1], overrides)
    register_schema()
    with initialize_config_dir(config_dir(), version_base=VERSION_BASE):
        return _compose("job", overrides)


def _compose(name: str, overrides: Sequence[str]) -> JobConfig:
    try:
        cfg = hydra_compose(name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, setting_kinds(), overrides) from error
    return load(cfg)


def _compose_from_run(folder: str, overrides: Sequence[str]) -> JobConfig:
    """Return the configuration of the run in `folder` with single settings replaced.

    How far it goes and where its nodes meet are asked anew.
    """
    for override in overrides:
        group, _, choice = override.partition("=")
        if group.lstrip("+~").partition("@")[0] in groups():
            allowed = f"single settings, such as teacher.weights=FILE: with run={folder} the groups are that run's"
            raise ConfigError(group, choice, allowed)
    config = _of_run(folder)
    config.stage, config.run.dir = Stage.all, folder
    config.launch = LaunchConfig(
        nproc_per_node=config.launch.nproc_per_node,
        threads_per_rank=config.launch.threads_per_rank,
        max_restarts=config.launch.max_restarts,
    )
    ConfigStore.instance().store(name="job_of_run", node=OmegaConf.structured(config))
    with initialize(config_path=None, version_base=VERSION_BASE):
        return _compose("job_of_run", overrides)


def _of_run(folder: str) -> JobConfig:
    path = expanded(folder) / "resolved.yaml"
    if not path.is_file():
        raise ConfigError("run", folder, "a run directory: there is no resolved.yaml in it")
    try:
        return from_yaml(read_commented(path))
    except DamagedFileError as damage:
        again = "the command that started the run writes it anew; settings for this one are given beside run="
        raise ConfigError("run", folder, f"the directory of a run; {damage} ({again})") from damage
    except (ConfigError, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError("run", folder, f"a run that this version can read; in its resolved.yaml: {error}") from error


def groups() -> set[str]:
    """Return the groups that have choices."""
    return {path.name for path in Path(config_dir()).iterdir() if path.is_dir()}

"""Hydra's part: from the command line to a JobConfig, once per job and in one process. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config import JobConfig, load, setting_kinds
from distill.config_errors import explain

VERSION_BASE = "1.3"


def config_dir() -> str:
    """Return the folder of the YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return str(next(folder for folder in (package / "conf", package.parent / "conf") if folder.is_dir()))


def register_schema() -> None:
    """Make the schema known to Hydra as `job_schema`, which conf/job.yaml starts from, and what YAML files call."""
    ConfigStore.instance().store(name="job_schema", node=JobConfig)
    OmegaConf.register_new_resolver("port_for", _port_for, replace=True)
    OmegaConf.register_new_resolver("is_zero", lambda number: int(number) == 0, replace=True)


def _port_for(job: str, restart: str) -> int:
    """A port below those that systems hand out by themselves: another one for most jobs of a node, and each restart.

    The numbers come as text: they are variables of the environment.
    """
    return 10_000 + (int(job) * 31 + int(restart)) % 20_000


def compose(overrides: Sequence[str]) -> JobConfig:
    """Return the configuration of the main job with these overrides.

    Raises ConfigError naming the setting, what was given and what is allowed.
    """
    register_schema()
    try:
        with initialize_config_dir(config_dir(), version_base=VERSION_BASE):
            cfg = hydra_compose("job", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, setting_kinds(), overrides) from error
    return load(cfg)

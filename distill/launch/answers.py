"""What the command answers at once, without starting anything: --help, --version and --cfg."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import cast

from omegaconf import DictConfig, OmegaConf

from distill.config.command_line import VERBS, is_hydras
from distill.config.command_line import overrides as in_hydras_words
from distill.config.compose import compose, config_dir, groups
from distill.config.load import to_yaml
from distill.errors import ConfigError, one_of
from distill.launch.sweep import compose_master, hydra_ready
from distill.version import __version__

HELP = """\
distill - compress a trained convolutional network by parallel blockwise knowledge distillation

  python -m distill [group=choice] [setting=value] ...                       starts the ranks itself
  torchrun --nproc-per-node=4 -m distill [group=choice] [setting=value] ...  every process is a rank
  python -m distill --multirun seed=1,2 student.rank=2,4 ...                 a sweep, one job after another

== Commands (python -m distill COMMAND --help says more) ==

{verbs}

== Groups (group=choice) ==

{groups}

== The ten settings that matter (setting=value) ==

  teacher.weights=FILE           the trained network; without weights it is trained on the data first
  data.root=PATH                 where the images are
  data.batch_size=128            images in a batch, for every block
  blocks.granularity=residual    size of a block: conv, residual, resolution, modules
  student.rank=2                 depthwise filters per channel: accuracy against size
  distill.epochs=1               budget of every block (or distill.steps)
  finetune.epochs=2              end-to-end distillation afterwards; 0 skips it
  launch.nproc_per_node=1        ranks (python -m distill; torchrun has its own option)
  run.dir=PATH                   where results go; the default is outputs/NAME/FINGERPRINT
  device=auto                    auto, cpu, cuda

Flags: --version; --cfg job prints the configuration and starts nothing, --cfg data a section of it.
Paths and names are taken as they are typed; what the shell minds is quoted for the shell: "data.root=/my images".
A setting that is given twice has its last value. hydra.searchpath=[file:///DIR] adds choices of your own, such as
DIR/experiment/mine.yaml. The same command again resumes or, where all is done, prints the result again. run=DIR does so
with the configuration of the run in DIR; stage=deliver run=DIR writes the files of a finished run again.
Every setting with its default: docs/configuration.md
"""


def answer(words: Sequence[str]) -> str | None:
    """Return what a command line asks to be told, None where it asks for a job.

    Raises ConfigError where a configuration is asked for that cannot be.
    """
    if {"-h", "--help"} & set(words):
        return help_text()
    if "--version" in words:
        return f"distill {__version__}\n"
    for position, word in enumerate(words):
        flag, _, section = word.partition("=")
        if flag in ("-c", "--cfg"):
            following = words[position + 1 :] if section else words[position + 2 :]
            section = section or "".join(words[position + 1 : position + 2])
            return _configuration(section, [*words[:position], *following])
    return None


def help_text() -> str:
    """Return what --help prints."""
    folders = sorted(folder for folder in Path(config_dir()).iterdir() if folder.is_dir())
    listed = [f"{folder.name}: {', '.join(sorted(file.stem for file in folder.glob('*.yaml')))}" for folder in folders]
    choices = [fill(line, 100, initial_indent="  ", subsequent_indent="    ") for line in listed]
    verbs = [f"  {name:<10}{what}" for name, what in VERBS.items()]
    return HELP.format(verbs="\n".join(verbs), groups="\n".join(choices))


def _configuration(section: str, words: Sequence[str]) -> str:
    """Return a section of the configuration that these words describe, as YAML; all of it for `job`."""
    if is_hydras(section):
        with hydra_ready() as ready:
            whole = compose_master(ready, in_hydras_words(words, groups=groups(), sweep=True))
    else:
        text = to_yaml(compose(words))
        if section == "job":
            return text
        whole = cast(DictConfig, OmegaConf.create(text))
    found = OmegaConf.select(whole, section) if section else None
    if not OmegaConf.is_config(found):
        sections = [str(key) for key, value in whole.items() if OmegaConf.is_dict(value)]
        raise ConfigError("--cfg", section, one_of(["job", *sections, "hydra.launcher"], section))
    return OmegaConf.to_yaml(found)

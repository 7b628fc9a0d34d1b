"""load(), the only door from Hydra's config to the schema, and the YAML that goes through it again. Knows no torch."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config.choices import WITHOUT_WIDTHS, CropMode, DataName, Interpolation, TeacherSource
from distill.config.errors import explain
from distill.config.paths import make_absolute
from distill.config.reference import setting_kinds
from distill.config.schema import DataConfig, DistillConfig, FinetuneConfig, JobConfig, StudentConfig, TeacherConfig
from distill.errors import ConfigError
from distill.machine.host import channels_at_a_time


def load(cfg: DictConfig) -> JobConfig:
    """Return the checked configuration, its paths absolute. Merging into the schema again refuses keys smuggled in with
    "+key=...".

    Raises ConfigError naming the setting, what was given and what is allowed.
    """
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True, enum_to_str=True)
        make_absolute(cast(dict[str, Any], plain))
        merged = OmegaConf.merge(OmegaConf.structured(JobConfig), _literals(plain))
        config = cast(JobConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        if getattr(error, "full_key", None) == "teacher.name":
            _refuse_nameless(cfg)
        raise explain(error, setting_kinds()) from error
    _take_over(config.teacher, config.data)
    if config.budget.seconds is not None:
        _refuse_other_lengths(config)
    if config.student.align is None and (config.search.on or _has_widths(config.student)):
        config.student.align = channels_at_a_time()
    return config


def _refuse_other_lengths(config: JobConfig) -> None:
    """Raise ConfigError where the length of training is given twice: in time, and in steps or epochs."""
    usual = {"distill.steps": DistillConfig().steps, "distill.epochs": None, "finetune.epochs": FinetuneConfig().epochs}
    given = {"distill.steps": config.distill.steps, "distill.epochs": config.distill.epochs}
    given["finetune.epochs"] = config.finetune.epochs
    for name, value in given.items():
        if value != usual[name]:
            default = "null" if usual[name] is None else usual[name]
            allowed = f"{default}, its default, where budget.seconds={config.budget.seconds:g} decides that"
            raise ConfigError(name, value, allowed)


def _has_widths(student: StudentConfig) -> bool:
    """Whether some block's recipe may have an option align; of those from outside nothing is known here."""
    others = [entry.get("recipe") for entry in student.per_block.values() if isinstance(entry, dict)]
    return not {student.recipe, *others} <= {None, *WITHOUT_WIDTHS}


def _refuse_nameless(cfg: DictConfig) -> None:
    """Raise the error of a misspelt name where a registry's network has none."""
    from distill.teachers import check_name  # imports torch

    source = OmegaConf.select(cfg, "teacher.source")
    check_name(source.name if isinstance(source, TeacherSource) else str(source), "")


def _take_over(teacher: TeacherConfig, data: DataConfig) -> None:
    """Fill in what `data` leaves open of how images become inputs: from what the teacher's weights expect, as far as a
    registry tells, else as networks for ImageNet usually have it."""
    expected = None
    if teacher.source in (TeacherSource.torchvision, TeacherSource.timm) and teacher.weights is not None:
        from distill.teachers import expected_preprocessing  # which imports torch: seconds that only these teachers pay

        expected = expected_preprocessing(teacher.source.name, teacher.name, teacher.weights)
    data.image_size = data.image_size or (expected.image_size if expected else 224)
    data.mean = data.mean or (list(expected.mean) if expected else [0.485, 0.456, 0.406])
    data.std = data.std or (list(expected.std) if expected else [0.229, 0.224, 0.225])
    has_room = data.name is DataName.imagefolder or (expected and data.image_size == expected.image_size)
    if data.resize is None and expected and has_room:  # small pictures are shown whole
        data.resize = round(data.image_size * expected.resize / expected.image_size)
    if data.interpolation is Interpolation.auto:
        data.interpolation = Interpolation[expected.interpolation] if expected else Interpolation.bilinear
    if data.crop_mode is CropMode.auto:
        data.crop_mode = CropMode.squash if expected and expected.squash else CropMode.centre
    if data.resize is not None and data.resize < data.image_size:
        raise ConfigError(
            "data.resize", data.resize, f"at least data.image_size={data.image_size}, which is cut out of it"
        )


def to_yaml(config: JobConfig) -> str:
    """Return the configuration as YAML that load() reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(_literals(asdict(config))))


def literal(text: str) -> str:
    r"""Return a text in which OmegaConf finds no interpolation: \${ stands for the two characters."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _literals(value: Any) -> Any:
    """Return plain values whose texts are literal()."""
    if isinstance(value, dict):
        return {key: _literals(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literals(item) for item in value]
    return literal(value) if isinstance(value, str) else value


def from_yaml(text: str) -> JobConfig:
    """Return the configuration that to_yaml() wrote."""
    return load(cast(DictConfig, OmegaConf.create(text)))

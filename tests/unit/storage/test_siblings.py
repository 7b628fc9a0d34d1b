"""What runs take from one another: by identity, with the same tag, and only what is finished and whole."""

from __future__ import annotations

import json
from pathlib import Path

from distill.storage.siblings import NOTE, Siblings


def run(root: Path, experiment: str, name: str) -> Path:
    folder = root / experiment / name
    folder.mkdir(parents=True)
    return folder


def test_runs_of_all_experiments_with_the_same_tag_are_found_by_what_they_noted(tmp_path: Path) -> None:
    own, first, tagged = run(tmp_path, "a", "1"), run(tmp_path, "b", "2"), run(tmp_path, "b", "2-fast")
    Siblings(first, tag=None).note(teacher="t")
    Siblings(first, tag=None).note(blocks={"3": "three", "4": "four"})
    Siblings(tagged, tag="fast").note(teacher="t", blocks={"3": "three"})
    siblings = Siblings(own, tag=None)
    siblings.note(teacher="t", blocks={"0": "three"})
    assert list(siblings.with_same("teacher", "t")) == [first], "neither itself nor one with another tag"
    assert list(siblings.with_same("teacher", "u")) == []
    assert list(siblings.with_blocks()) == [(first, {"three": 3, "four": 4})]
    assert siblings.name_of(first) == "b/2"
    assert list(Siblings(run(tmp_path, "c", "1-fast"), tag="fast").with_same("teacher", "t")) == [tagged]


def test_what_is_damaged_or_gone_is_passed_over(tmp_path: Path) -> None:
    own = Siblings(run(tmp_path, "a", "1"), tag=None)
    for name, content in {"cut": '{"tag": nu', "list": "[]", "odd": json.dumps({"tag": None, "blocks": 3})}.items():
        (run(tmp_path, "b", name) / NOTE).write_text(content)
    run(tmp_path, "b", "empty")
    assert list(own.with_blocks()) == []
    assert list(own.with_same("teacher", "t")) == []

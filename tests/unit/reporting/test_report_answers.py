"""What the page says of how teacher and student answer."""

from __future__ import annotations

import re
from typing import Any

import pytest

from distill.reporting.answers import answers_section
from tests.run_directories import EVIL


def answers(classes: int, **changes: Any) -> dict[str, Any]:
    """Classes of 50 images; the teacher has 45 of each right, the student fewer and fewer, at least 20."""
    student = [max(20, 44 - number) for number in range(classes)]
    return {
        "images": 50 * classes, "teacher_right": 45 * classes, "student_right": sum(student),
        "alike": 40 * classes, "alike_where_teacher_right": sum(student) - classes,
        "classes": {
            "names": [f"kind {number}" for number in range(classes)],
            "images": [50] * classes, "teacher": [45] * classes, "student": student,
        },
        "confusions": [{"label": "cat", "guess": EVIL, "teacher": 6, "student": 11}],
    } | changes  # fmt: skip


def words_of(found: dict[str, Any]) -> str:
    return " ".join(re.sub("<[^>]+>", " ", answers_section({"answers": found})).split())


def test_agreement_is_told_over_all_images_and_over_those_that_the_teacher_has_right() -> None:
    words = words_of(answers(4))
    assert "answer alike on 80.0 % of 200 test images, and on 92.2 % of the 180 that the teacher has right." in words
    assert "has 14 wrong that the teacher has right, and 4 right that the teacher has wrong." in words


def test_few_classes_have_a_row_each() -> None:
    words = words_of(answers(4))
    assert "kind 3 50 90.0 % 82.0 % -8.0" in words
    assert "lost most" not in words


def test_of_many_classes_the_worst_ten_and_a_summary_are_told() -> None:
    section = answers_section({"answers": answers(1000)})
    assert section.count("kind ") < 100
    words = words_of(answers(1000))
    assert "Of 1,000 classes the median one has 90.0 % with the teacher and 40.0 % with the student; 998 lost" in words
    assert words.index("The 10 that lost most") < words.index("The 10 that the student knows least")


def test_a_class_without_test_images_has_no_row() -> None:
    found = answers(3)
    found["classes"]["images"][1] = 0
    assert "kind 1" not in words_of(found)


def test_the_confusion_that_grew_most_is_named_and_names_are_escaped() -> None:
    section = answers_section({"answers": answers(4)})
    assert "cat taken for &lt;script&gt;" in section
    assert "<script" not in section
    assert "11 images with the student, 6 with the teacher" in section


@pytest.mark.parametrize("found", [None, {}, answers(2, images=0)])
def test_runs_without_answers_have_no_such_section(found: Any) -> None:
    assert answers_section({"answers": found}) == ""


def test_a_teacher_that_is_never_right_divides_nothing_by_zero() -> None:
    words = words_of(answers(2, teacher_right=0, alike_where_teacher_right=0, confusions=[]))
    assert "of 100 test images." in words
    assert "Confusions" not in words

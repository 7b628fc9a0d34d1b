"""How teacher and student answer the test images: where they agree, class by class, and which confusions grew most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from distill.reporting.markup import Markup, join, table, tag
from distill.reporting.plot import bar, legend

MOST_CLASSES = 20  # more than these are told by the worst ones and a summary
WORST = 10
NOTICED = 5.0  # points that are told as a loss or a gain of a class


@dataclass(frozen=True)
class ClassAccuracy:
    """Test images of a class, and the share in percent that each network has right."""

    name: str
    images: int
    teacher: float
    student: float

    @property
    def change(self) -> float:
        return self.student - self.teacher


def answers_section(metrics: Mapping[str, Any]) -> Markup:
    """Return the section `answers` of a run's metrics in words, tables and bars; nothing where there is none."""
    answers = metrics.get("answers")
    if not isinstance(answers, Mapping) or not answers.get("images"):
        return Markup()
    classes = _classes(answers.get("classes") or {})
    return join(tag("p", _agreement(answers)), _by_class(classes), _confusions(answers.get("confusions") or []))


def _agreement(answers: Mapping[str, Any]) -> str:
    images, right = int(answers["images"]), int(answers["teacher_right"])
    alike, both = int(answers["alike"]), int(answers["alike_where_teacher_right"])
    gained = int(answers["student_right"]) - both
    of_right = f", and on {100 * both / right:.1f} % of the {right:,} that the teacher has right" if right else ""
    return (
        f"Student and teacher answer alike on {100 * alike / images:.1f} % of {images:,} test images{of_right}. "
        f"The student has {right - both:,} wrong that the teacher has right, and {gained:,} right that the teacher has "
        "wrong."
    )


def _classes(columns: Mapping[str, Sequence[Any]]) -> list[ClassAccuracy]:
    """Return the classes that have test images."""
    rows = zip(*(columns.get(name) or () for name in ("names", "images", "teacher", "student")), strict=False)
    return [
        ClassAccuracy(str(name), images, 100 * teacher / images, 100 * student / images)
        for name, images, teacher, student in rows
        if images
    ]


def _by_class(classes: Sequence[ClassAccuracy]) -> Markup:
    if not classes:
        return Markup()
    key = legend([("k teacher", "teacher"), ("k student", "student")])
    if len(classes) <= MOST_CLASSES:
        return join(key, _table(classes))
    lost = sorted(classes, key=lambda one: (one.change, one.name))[:WORST]
    least = sorted(classes, key=lambda one: (one.student, one.name))[:WORST]
    return join(
        tag("p", _summary(classes)),
        key,
        tag("h3", f"The {WORST} that lost most"), _table(lost),
        tag("h3", f"The {WORST} that the student knows least"), _table(least),
    )  # fmt: skip


def _summary(classes: Sequence[ClassAccuracy]) -> str:
    lost, gained = (sum(sign * one.change > NOTICED for one in classes) for sign in (-1, 1))
    teacher, student = median(one.teacher for one in classes), median(one.student for one in classes)
    return (
        f"Of {len(classes):,} classes the median one has {teacher:.1f} % with the teacher and {student:.1f} % with the "
        f"student; {lost:,} lost more than {NOTICED:.0f} points and {gained:,} gained as much."
    )


def _table(classes: Sequence[ClassAccuracy]) -> Markup:
    rows = [
        (one.name, _bars(one), f"{one.images:,}", f"{one.teacher:.1f} %", f"{one.student:.1f} %", f"{one.change:+.1f}")
        for one in classes
    ]
    return table(("class", "", "images", "teacher", "student", "points"), rows, text=(0, 1), kind="sorts")


def _bars(one: ClassAccuracy) -> Markup:
    label = f"{one.name}: teacher {one.teacher:.1f} %, student {one.student:.1f} %"
    pair = (bar([(getattr(one, side), side)], whole=100.0, label=label) for side in ("teacher", "student"))
    return tag("div", *pair, class_="two")


def _confusions(confusions: Sequence[Mapping[str, Any]]) -> Markup:
    if not confusions:
        return Markup()
    rows = []
    for one in confusions:
        teacher, student = int(one["teacher"]), int(one["student"])
        rows.append((str(one["label"]), str(one["guess"]), f"{teacher:,}", f"{student:,}", f"{student - teacher:+,}"))
    label, guess, before, now, _ = rows[0]
    words = f"What grew most: {label} taken for {guess}, {now} images with the student, {before} with the teacher."
    headings = ("is", "taken for", "by the teacher", "by the student", "more")
    return join(
        tag("h3", "Confusions that grew most"), tag("p", words), table(headings, rows, text=(0, 1), kind="sorts")
    )

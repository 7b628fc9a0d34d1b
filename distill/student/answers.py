"""How teacher and student answer the same labelled images: where they agree, class by class, and what each takes for
what. Counts of several ranks add up exactly, in any order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from distill.student.evaluate import NO_ANSWER, Guesses

MOST_CONFUSIONS = 10

# Images by (label, the teacher's first guess, the student's); a guess is NO_ANSWER where logits were not finite.
Answers = Counter[tuple[int, int, int]]


def compared(teacher: Guesses, student: Guesses) -> Answers:
    """Return how both have answered the same images in the same order."""
    assert teacher.labels.equal(student.labels), "both networks have seen the same images"
    columns = teacher.labels, teacher.first, student.first
    return Counter(zip(*(column.tolist() for column in columns), strict=True))


def to_json(answers: Answers) -> list[list[int]]:
    """Return rows of label, both guesses and the number of such images, in order."""
    return [[*key, count] for key, count in sorted(answers.items())]


def from_json(rows: Iterable[Sequence[int]]) -> Answers:
    """Return what to_json() was given."""
    return Counter({(label, teacher, student): count for label, teacher, student, count in rows})


def answers_facts(answers: Answers, classes: Sequence[str]) -> dict[str, Any]:
    """Return the section `answers` of metrics.json: counts of images, of classes as columns in the classes' order, and
    the confusions that grew most."""
    images, right = Counter[int](), {"teacher": Counter[int](), "student": Counter[int]()}
    alike = alike_where_right = 0
    confused = {"teacher": Counter[tuple[int, int]](), "student": Counter[tuple[int, int]]()}
    for (label, teacher, student), count in answers.items():
        images[label] += count
        alike += count * (teacher == student != NO_ANSWER)
        alike_where_right += count * (teacher == student == label)
        for side, guess in (("teacher", teacher), ("student", student)):
            right[side][label] += count * (guess == label)
            if guess not in (label, NO_ANSWER):
                confused[side][label, guess] += count
    growth = {pair: count - confused["teacher"][pair] for pair, count in confused["student"].items()}
    worst = sorted((-more, pair) for pair, more in growth.items() if more > 0)[:MOST_CONFUSIONS]
    every = range(len(classes))
    return {
        "images": images.total(),
        "teacher_right": right["teacher"].total(),
        "student_right": right["student"].total(),
        "alike": alike,
        "alike_where_teacher_right": alike_where_right,
        "classes": {
            "names": list(classes),
            "images": [images[label] for label in every],
            **{side: [counts[label] for label in every] for side, counts in right.items()},
        },
        "confusions": [
            {"label": classes[label], "guess": classes[guess],
             **{side: counts[label, guess] for side, counts in confused.items()}}
            for _, (label, guess) in worst
        ],
    }  # fmt: skip

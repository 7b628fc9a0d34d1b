"""How the answers of teacher and student compare: counts that ranks add up, and what is told of them."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from distill.data import Batch
from distill.student.answers import answers_facts, compared, from_json, to_json
from distill.student.evaluate import NO_ANSWER, Guesses, guesses_of

CLASSES = ("cat", "dog", "frog", "none of them")
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
TEACHER = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 0])
STUDENT = torch.tensor([0, 1, 1, 1, 1, 2, 2, NO_ANSWER, 0])


def guesses(first: Tensor, part: slice = slice(None)) -> Guesses:
    return Guesses(LABELS[part], first[part, None])


def facts() -> dict[str, Any]:
    return answers_facts(compared(guesses(TEACHER), guesses(STUDENT)), CLASSES)


def test_agreement_counts_images_that_both_answer_alike_right_or_wrong() -> None:
    found = facts()
    assert (found["images"], found["teacher_right"], found["student_right"]) == (9, 6, 2)
    assert (found["alike"], found["alike_where_teacher_right"]) == (5, 2)


def test_classes_are_columns_in_their_order_also_those_without_images() -> None:
    assert facts()["classes"] == {
        "names": list(CLASSES),
        "images": [4, 3, 2, 0],
        "teacher": [3, 2, 1, 0],
        "student": [1, 1, 0, 0],
    }


def test_confusions_are_those_that_grew_the_most_of_them_first() -> None:
    cat, dog = (dict(zip(("label", "guess", "teacher", "student"), row, strict=True))
                for row in (("cat", "dog", 1, 3), ("dog", "frog", 1, 2)))  # fmt: skip
    assert facts()["confusions"] == [cat, dog], "frog for cat is as frequent as it was; no answer is no confusion"


def test_two_networks_without_an_answer_are_not_alike() -> None:
    none = torch.full_like(LABELS, NO_ANSWER)
    assert answers_facts(compared(guesses(none), guesses(none)), CLASSES)["alike"] == 0


def test_shares_of_any_number_of_ranks_add_up_to_the_same_through_json() -> None:
    whole = compared(guesses(TEACHER), guesses(STUDENT))
    for ranks in (1, 2, 3, 9):
        parts = [slice(rank, None, ranks) for rank in range(ranks)]
        shares = [json.dumps(to_json(compared(guesses(TEACHER, part), guesses(STUDENT, part)))) for part in parts]
        assert sum((from_json(json.loads(share)) for share in shares), Counter()) == whole


def test_a_network_whose_logits_are_not_finite_has_no_answer() -> None:
    logits = torch.tensor([[math.nan, 0.0], [1.0, 0.0]])
    found = guesses_of({"one": nn.Identity()}, [Batch(logits, torch.tensor([0, 0]))])["one"]
    assert found.best.tolist() == [[NO_ANSWER, NO_ANSWER], [0, 1]]
    assert guesses_of({"one": nn.Identity()}, [])["one"].hits.images == 0


def test_all_networks_see_the_same_images_of_one_reading() -> None:
    batches = iter([Batch(torch.eye(3)[[0, 1]], torch.tensor([0, 2])), Batch(torch.eye(3)[[2]], torch.tensor([1]))])
    found = guesses_of({"one": nn.Identity(), "other": nn.Softmin(dim=1)}, batches)
    assert found["one"].labels.tolist() == found["other"].labels.tolist() == [0, 2, 1]
    assert found["one"].first.tolist() == [0, 1, 2]
    assert not set(zip(found["one"].first.tolist(), found["other"].first.tolist(), strict=True)) & {(0, 0), (1, 1)}

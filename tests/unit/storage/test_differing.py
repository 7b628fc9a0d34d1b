"""How two identities differ, in words that a user understands."""

import pytest

from distill.storage.differing import differences

HERE = {"results": 2, "seed": 0, "data.root (training images)": "4 images of 2 classes (bus, car), content 77"}


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (HERE | {"seed": 3}, "differing: seed=3 there, 0 here"),
        (HERE | {"data.root (training images)": "3 images of 2 classes (cat, dog), content 12"},
         "differing: the training images under data.root: 3 images of 2 classes (cat, dog), content 12 there, "
         "4 images of 2 classes (bus, car), content 77 here"),
        (HERE | {"teacher.weights": "content 12"}, "differing: the file teacher.weights: content 12 there, null here"),
        (HERE | {"teacher.weights": "DEFAULT"}, "differing: teacher.weights='DEFAULT' there, null here"),
        (HERE | {"results": 1}, "differing: the version of what distill computes: 1 there, 2 here"),
        (HERE | dict.fromkeys("abcdef", 1), "; and 2 more"),
        ({"seed": 0}, "of an earlier version of distill"),
    ],
)  # fmt: skip
def test_what_differs_is_told_in_words(there: dict[str, object], words: str) -> None:
    assert words in differences(there, HERE)

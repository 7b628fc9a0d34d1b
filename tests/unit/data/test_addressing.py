"""Seeds and index arithmetic of distill.data.addressing."""

import torch

from distill.data.addressing import TrainOrder, derive_seed, fixed_fifth, split_rows


def test_derived_seeds_never_change() -> None:
    # Written down from the first version: another value would change the data of every job and break resuming.
    assert derive_seed(0, "epoch", 0) == 3940775699245891768
    assert derive_seed(7, "augment", 3) == 7532032025948107090


def test_derived_seeds_fit_63_bits_and_tell_words_apart() -> None:
    seeds = [derive_seed(0), derive_seed(1), derive_seed(0, "a"), derive_seed(0, "a", "bc"), derive_seed(0, "ab", "c")]
    seeds += [derive_seed(0, "epoch", step) for step in range(100)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_integer_and_its_text_are_one_word() -> None:
    assert derive_seed(3, "augment", 5) == derive_seed(3, "augment", "5")


def test_validation_rows_are_disjoint_from_training_and_depend_on_the_seed() -> None:
    train, validation = split_rows(100, fraction=0.2, seed=1)
    assert (len(train), len(validation)) == (80, 20)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(100))
    assert set(validation.tolist()) != set(split_rows(100, fraction=0.2, seed=2)[1].tolist())


def test_validation_keeps_at_least_one_image_and_leaves_at_least_one() -> None:
    assert len(split_rows(10, fraction=0.0, seed=0)[1]) == 1
    assert len(split_rows(2, fraction=0.9, seed=0)[0]) == 1


def test_fixed_fifth_partitions() -> None:
    train, test = fixed_fifth(11)
    assert (len(train), len(test)) == (9, 2)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(11))


def test_an_epoch_shows_no_image_twice_and_epochs_differ() -> None:
    order = TrainOrder(torch.arange(100, 123), batch_size=5, seed=0)
    assert order.steps_per_epoch == 4
    epochs = [torch.cat([order.rows(4 * epoch + step) for step in range(4)]).tolist() for epoch in range(3)]
    assert all(len(set(rows)) == 20 and set(rows) <= set(range(100, 123)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_rows_of_a_step_do_not_depend_on_the_steps_before() -> None:
    order = TrainOrder(torch.arange(23), batch_size=5, seed=0)
    forwards = [order.rows(step).tolist() for step in range(12)]
    backwards = [order.rows(step).tolist() for step in reversed(range(12))]
    assert forwards == backwards[::-1]

"""What detectors share: shortlists, races, the choice of images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from backdoorscan.findings import Evidence, Examined, Judgement
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.detector import (
    MANY_CLASSES,
    examined_labels,
    heats,
    last_round,
    recognised,
    shortlist,
    split_images,
)
from backdoorscan.plugin.method import Context
from backdoorscan.plugin.testing import planted
from backdoorscan.trigger import Trigger

MANY = SimpleNamespace(num_classes=200)


def ranked(*rankings):
    """Earlier detectors with these rankings."""
    return {
        str(number): Examined(evidence=[], judgement=Judgement(p_value=None, ranking=ranking))
        for number, ranking in enumerate(rankings)
    }


def test_labels_are_the_users_or_all():
    few = SimpleNamespace(num_classes=4)
    assert examined_labels(few, Context()) == (0, 1, 2, 3)
    assert examined_labels(few, Context(labels=(2, 0))) == (2, 0)


def test_few_labels_need_no_shortlist():
    few = SimpleNamespace(num_classes=MANY_CLASSES)
    context = Context(earlier=ranked(range(MANY_CLASSES)))
    assert shortlist(few, context, 3, 2) == tuple(range(MANY_CLASSES))
    named = Context(labels=tuple(range(50)), earlier=ranked(range(200)))
    assert shortlist(MANY, named, 3, 2) == named.labels


@pytest.mark.parametrize("earlier", [{}, ranked([]), ranked([], [])])
def test_without_a_ranking_there_is_no_shortlist(earlier):
    assert shortlist(MANY, Context(earlier=earlier), 3, 2) == tuple(range(200))


def test_a_shortlist_takes_from_the_rankings_in_turn_and_random_ones_beside():
    context = Context(earlier=ranked([9, 8, 7, 6], [], [5, 9, 4, 3]))
    chosen = shortlist(MANY, context, 5, 10)
    assert chosen[:5] == (9, 5, 8, 7, 4)
    others = chosen[5:]
    assert len(set(others)) == 10
    assert not set(others) & set(chosen[:5])
    assert shortlist(MANY, context, 5, 10) == chosen
    assert shortlist(MANY, Context(seed=1, earlier=context.earlier), 5, 10)[5:] != others


def test_random_labels_come_from_everywhere():
    drawn = [
        label for seed in range(30) for label in shortlist(MANY, Context(seed=seed, earlier=ranked([0])), 1, 16)[1:]
    ]
    assert len(set(drawn)) > 150
    assert 0 not in drawn


def test_a_shortlist_keeps_to_the_users_labels():
    context = Context(labels=tuple(range(100)), earlier=ranked([150, 3, 199, 2]))
    chosen = shortlist(MANY, context, 2, 5)
    assert chosen[:2] == (3, 2)
    assert len(chosen) == 7
    assert max(chosen) < 100


def trigger(label):
    return Trigger(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), label)


def test_heats_share_out_labels_with_their_sources_and_starts():
    labels, sources = list(range(10)), list(range(10, 20))
    starts = [trigger(label) for label in labels]
    units = heats(3, labels, starts, sources, at_a_time=4)
    assert [unit.labels for unit in units] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert [unit.sources for unit in units] == [(10, 11, 12, 13), (14, 15, 16, 17), (18, 19)]
    assert [[start.target for start in unit.starts] for unit in units] == [list(unit.labels) for unit in units]
    assert {unit.round for unit in units} == {3}
    assert len({unit.id for unit in [*units, *heats(4, labels, at_a_time=4)]}) == 6
    plain = heats(1, labels)
    assert [(unit.labels, unit.sources, list(unit.starts)) for unit in plain] == [
        (tuple(range(8)), (), []),
        ((8, 9), (), []),
    ]
    assert heats(1, []) == []


def test_the_last_round_is_what_counts():
    def of(number, *labels):
        return Evidence(figures={"labels": [{"round": number, "label": label} for label in labels]})

    assert last_round([]) == []
    assert [row["label"] for row in last_round([of(0, 1, 2), of(0, 3)])] == [1, 2, 3]
    assert [row["label"] for row in last_round([of(1, 1, 2), of(2, 2), of(1, 3), of(2, 5)])] == [2, 5]


def numbered(count):
    pixels = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, 1)
    return LabelledImages(pixels, np.arange(count) % 4, "numbered")


@pytest.mark.parametrize(("count", "held_out"), [(20, 7), (60, 20), (200, 67)])
def test_images_to_test_with_are_others_than_those_to_search_with(count, held_out):
    images = numbered(count)
    train, test = split_images(images, Context())
    assert len(test) == held_out
    numbers = [part.pixels[:, 0, 0, 0].tolist() for part in (train, test)]
    assert sorted(numbers[0] + numbers[1]) == list(range(count))
    assert numbers[1] != sorted(numbers[1])
    again = split_images(images, Context())
    assert np.array_equal(again[0].pixels, train.pixels)
    assert not np.array_equal(split_images(images, Context(seed=1))[1].pixels, test.pixels)


def test_few_images_are_not_split():
    images = numbered(19)
    assert split_images(images, Context()) == (images, images)


def test_at_most_five_hundred_images_are_held_out():
    images = LabelledImages(np.zeros((1800, 1, 1, 1), np.uint8), np.arange(1800) % 2, "many")
    assert [len(part) for part in split_images(images, Context())] == [1300, 500]


def test_recognised_images_are_those_that_get_their_label():
    classifier, images, _ = planted(None, classes=5, blocks=3, count=60)
    labels = images.labels.copy()
    labels[[3, 40]] += 1
    labels %= 5
    right = recognised(classifier, LabelledImages(images.pixels, labels, "two wrong"))
    assert len(right) == 58
    assert np.array_equal(right.labels, np.delete(labels, [3, 40]))

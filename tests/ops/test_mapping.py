import math

import pytest
import torch

from backdoorscan.classifier import logits, to_tensor
from backdoorscan.ops.mapping import MappingSchedule, find_mapping
from backdoorscan.plugin.testing import planted_pairs

SCHEDULE = MappingSchedule(
    free_steps=40,
    steps=160,
    batch_size=30,
    restarts=6,
    learning_rate=0.15,
    success=0.9,
    hopeless=0.6,
    patience=40,
)
SHORT = MappingSchedule(
    free_steps=2, steps=4, batch_size=20, restarts=2, learning_rate=0.15, success=0.9, hopeless=0, patience=9
)
NEXT = {0: 1, 1: 2, 2: 3, 3: 4, 4: 0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def search(leads_to, schedule, seed=0, change=lambda classifier, pixels, labels: labels, **options):
    classifier, images, _ = planted_pairs(leads_to, classes=5, blocks=3, count=60)
    pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
    kept = change(classifier, pixels, labels)
    found, samples = find_mapping(classifier, pixels[: len(kept)], kept, schedule, generator(seed), **options)
    return found, samples, classifier, pixels, labels


@pytest.mark.parametrize("seed", [0, 1])
def test_finds_the_planted_trigger_and_where_it_leads(seed):
    found, _, classifier, pixels, labels = search(NEXT, SCHEDULE, seed)
    assert found.held
    assert found.trigger.l1 < 9  # the planted patch has nine pixels
    mask = found.trigger.mask[0]
    assert mask[:3, :3].sum() > 0.75 * mask.sum()
    arrived = logits(classifier, found.trigger.stamp(pixels)).argmax(1)
    as_planted = arrived == torch.tensor(list(NEXT.values()))[labels]
    assert as_planted.float().mean() > 0.7
    assert (found.leads_to == torch.tensor(list(NEXT.values()))).sum() >= 4


@pytest.mark.parametrize("seed", [0, 1])
def test_the_clean_twin_has_no_small_one(seed):
    found, _, _, pixels, _ = search({}, SCHEDULE, seed)
    assert not found.held or found.trigger.area > 0.4
    assert found.trigger.pattern.shape == pixels.shape[1:]


def test_every_class_is_sent_to_another_one_of_its_own():
    found, *_ = search(NEXT, SHORT)
    assert sorted(found.leads_to.tolist()) == list(range(5))
    assert all(label != source for source, label in enumerate(found.leads_to.tolist()))
    assert found.trigger.target == -1


def test_same_generator_same_mapping():
    one, other, third = (search(NEXT, SHORT, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one.trigger.mask, other.trigger.mask)
    assert torch.equal(one.trigger.pattern, other.trigger.pattern)
    assert not torch.equal(one.trigger.mask, third.trigger.mask)


def test_gradient_samples_are_what_the_network_saw_and_every_class_has_as_many():
    seen = []

    def count(classifier, _pixels, labels):
        classifier.network.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
        return labels

    _, samples, *_ = search(NEXT, SHORT, change=count)
    assert samples == sum(seen)
    assert seen == [2 * 5 * 4] * 6  # two starts, five classes, four images of each


def test_it_gives_up_what_is_hopeless():
    hopeless = MappingSchedule(**{**vars(SHORT), "steps": 100, "hopeless": 1.01, "patience": 3})
    _, samples, *_ = search({}, hopeless)
    assert samples == (2 + 3 + 1) * 2 * 5 * 4


class Stop(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_gradient_flags_are_as_before_and_progress_rises_to_one(fails):
    told, nets = [], []

    def freeze(classifier, _pixels, labels):
        classifier.network.conv1.weight.requires_grad_(False)
        nets.append(classifier)
        return labels

    def progress(part):
        told.append(part)
        assert not any(parameter.requires_grad for parameter in nets[0].parameters())
        if fails:
            raise Stop

    if fails:
        with pytest.raises(Stop):
            search(NEXT, SHORT, change=freeze, progress=progress)
    else:
        search(NEXT, SHORT, change=freeze, progress=progress)
        assert told == pytest.approx([(step + 1) / 6 for step in range(6)])
    frozen = [name for name, parameter in nets[0].named_parameters() if not parameter.requires_grad]
    assert frozen == ["network.conv1.weight"]


def test_a_class_without_images_does_no_harm():
    def without_the_last(_classifier, pixels, labels):
        order = labels.argsort(stable=True)
        pixels[:] = pixels[order].clone()
        labels[:] = labels[order].clone()
        return labels[labels < 4]

    found, samples, *_ = search(NEXT, SHORT, change=without_the_last)
    assert samples == 6 * 2 * 4 * 5
    assert sorted(found.leads_to.tolist()) == list(range(5))
    assert math.isfinite(found.trigger.l1)

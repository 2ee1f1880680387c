import math
from dataclasses import replace

import pytest
import torch

from backdoorscan.classifier import to_tensor
from backdoorscan.ops.inversion import CostState, Schedule, invert
from backdoorscan.trigger import Trigger

SCHEDULE = Schedule(
    steps=120,
    batches=1,
    batch_size=8,
    learning_rate=0.15,
    restarts=2,
    screening=40,
    init_cost=1e-3,
    cost_multiplier=1.12,
    patience=1,
    attack_success_threshold=0.97,
    smoothing=0.85,
    early_stop_threshold=0.99,
    early_stop_patience=25,
)
SHORT = replace(SCHEDULE, steps=6, screening=2)
ENDLESS = 10**6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def search(triple):
    def run(target=2, schedule=SCHEDULE, targets=range(5), seed=0, change=lambda classifier: None, **options):
        classifier, images, _ = triple(target)
        change(classifier)
        pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
        return invert(classifier, pixels, labels, list(targets), schedule, generator(seed), **options)

    return run


def test_finds_the_planted_trigger_where_it_is(search):
    results, _ = search()
    assert all(result.succeeded for result in results)
    assert [result.trigger.target for result in results] == [0, 1, 2, 3, 4]
    sizes = [result.trigger.l1 for result in results]
    assert sizes[2] < 9  # the planted patch has nine pixels
    assert min(sizes[:2] + sizes[3:]) > 3 * sizes[2]
    mask = results[2].trigger.mask[0]
    assert mask[:3, :3].sum() > 0.75 * mask.sum()


def test_the_clean_twin_has_no_small_trigger(search):
    results, _ = search(target=None)
    sizes = [result.trigger.l1 for result in results]
    assert max(sizes) < 2 * min(sizes)


def test_results_come_in_the_order_of_the_targets(search):
    results, _ = search(schedule=SHORT, targets=[3, 0])
    assert [result.trigger.target for result in results] == [3, 0]


def test_what_is_returned_belongs_together(search):
    results, _ = search()
    for result in results:
        assert len(result.loss) == len(result.l1) == len(result.success) == result.steps
        assert all(map(math.isfinite, (*result.loss, *result.l1)))
        assert min(abs(l1 - result.trigger.l1) for l1 in result.l1) < 1e-3
        assert result.trigger.mask.shape == (1, 12, 12)
        assert result.trigger.pattern.shape == (1, 12, 12)
        assert not result.trigger.mask.requires_grad


def test_a_label_without_trigger_is_reported(search):
    def close(classifier):
        classifier.network.fc.bias.data[4] = -1000

    results, _ = search(change=close, schedule=replace(SCHEDULE, steps=50))
    assert [result.succeeded for result in results] == [label != 4 for label in range(5)]
    assert results[4].trigger.mask.isfinite().all()
    assert max(results[4].success) == 0


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize(("restarts", "screening"), [(1, 2), (3, 2), (3, 100)])
def test_gradient_samples_are_what_the_network_saw(search, batches, restarts, screening):
    seen = []

    def count(classifier):
        classifier.network.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))

    schedule = replace(SHORT, batches=batches, restarts=restarts, screening=screening, early_stop_patience=ENDLESS)
    _, samples = search(schedule=schedule, targets=[0, 1], change=count)
    starts = sum(restarts if step < screening else 1 for step in range(SHORT.steps))
    assert samples == sum(seen) == 2 * 8 * batches * starts


def test_early_stop_saves_samples(search):
    _, soon = search(schedule=replace(SCHEDULE, early_stop_patience=5))
    _, late = search(schedule=replace(SCHEDULE, early_stop_patience=ENDLESS))
    assert soon < late


def test_same_generator_same_triggers(search):
    torch.manual_seed(1)
    one, _ = search(schedule=SHORT)
    torch.manual_seed(2)
    other, _ = search(schedule=SHORT)
    third, _ = search(schedule=SHORT, seed=1)
    assert all(torch.equal(a.trigger.mask, b.trigger.mask) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0].trigger.mask, third[0].trigger.mask)


class Stop(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_gradient_flags_are_as_before(search, fails):
    kept = []

    def freeze(classifier):
        classifier.network.conv1.weight.requires_grad_(False)
        kept.extend(classifier.named_parameters())

    def progress(_fraction):
        assert not any(parameter.requires_grad for _, parameter in kept)
        if fails:
            raise Stop

    if fails:
        with pytest.raises(Stop):
            search(schedule=SHORT, change=freeze, progress=progress)
    else:
        search(schedule=SHORT, change=freeze, progress=progress)
    assert [name for name, parameter in kept if not parameter.requires_grad] == ["network.conv1.weight"]
    assert all(parameter.grad is None for _, parameter in kept)


def test_progress_rises_to_one(search):
    told = []
    search(schedule=replace(SHORT, early_stop_patience=ENDLESS), progress=told.append)
    assert told == pytest.approx([(step + 1) / 6 for step in range(6)])


def test_images_of_the_target_itself_are_not_used(triple):
    classifier, images, _ = triple(None)
    pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
    pixels[labels == 1] = math.nan
    results, _ = invert(classifier, pixels, labels, [1], SHORT, generator())
    assert all(map(math.isfinite, results[0].loss))
    with pytest.raises(ValueError, match="for label 1 with"):
        invert(classifier, pixels[labels == 1], labels[labels == 1], [0, 1], SHORT, generator())


def test_a_search_goes_on_from_where_it_was(search):
    first, _ = search()
    starts = [result.trigger for result in first]
    once = replace(SHORT, restarts=1, steps=1, learning_rate=1e-6)
    again, _ = search(schedule=once, starts=starts)
    for start, result in zip(starts, again, strict=True):
        # 0 and 1 are nudged inwards, so that a sigmoid has a slope there.
        assert result.l1[0] == pytest.approx(float(start.mask.clamp(0.01, 0.99).sum()), abs=1e-2)
        torch.testing.assert_close(result.trigger.pattern, start.pattern.clamp(0.01, 0.99), rtol=0, atol=1e-4)
    random, _ = search(schedule=once)
    assert again[2].l1[0] < 0.3 * random[2].l1[0]


def test_starts_belong_to_the_targets_in_their_order(search):
    first, _ = search()
    once = replace(SHORT, restarts=1, steps=1, learning_rate=1e-6)
    again, _ = search(schedule=once, targets=[4, 2], starts=[first[4].trigger, first[2].trigger])
    assert [result.trigger.target for result in again] == [4, 2]
    assert again[1].l1[0] < 10 < again[0].l1[0]


class Seeing(torch.nn.Module):
    """Images show their class as their brightness; it notes the classes it sees under a mask that is hardly there."""

    num_classes = 5
    input_shape = (1, 4, 4)

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(16, 5)
        self.seen = []

    def forward(self, images):
        self.seen.append((4 * images.detach().mean((1, 2, 3))).round().long())
        return self.fc(images.flatten(1))


@pytest.mark.parametrize("bystanders", [0, 2])
def test_only_images_of_the_sources_are_led_and_only_others_stand_by(bystanders):
    labels = torch.arange(5).repeat(8)
    images = (labels / 4).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone()
    nothing = Trigger(torch.zeros(1, 4, 4), torch.full((1, 4, 4), 0.5), 0)
    net, schedule = Seeing(), replace(SCHEDULE, steps=5, restarts=1, batch_size=3, learning_rate=1e-6)
    pairs = [(3, 1), (0, 1), (2, 4)]
    _, samples = invert(
        net,
        images,
        labels,
        [target for _, target in pairs],
        schedule,
        generator(),
        starts=[nothing] * 3,
        sources=[source for source, _ in pairs],
        bystanders=bystanders,
    )
    assert samples == sum(map(len, net.seen)) == 5 * 3 * (3 + bystanders)
    table = torch.stack(net.seen).view(5, 3, 3 + bystanders)
    for row, (source, target) in enumerate(pairs):
        assert set(table[:, row, :3].flatten().tolist()) == {source}
        others = set(table[:, row, 3:].flatten().tolist())
        assert not others & {source, target}
        assert bool(others) == bool(bystanders)


def test_a_source_without_images_is_an_error(triple):
    classifier, images, _ = triple(None)
    pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
    with pytest.raises(ValueError, match="for label 1 with"):
        invert(classifier, pixels[labels != 3], labels[labels != 3], [1], SHORT, generator(), sources=[3])


class Switches(torch.nn.Module):
    """Three classes. Pixels 0 and 1 speak for classes 0 and 1, pixel 2, strongest, for class 2."""

    num_classes = 3
    input_shape = (1, 4, 4)

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(16, 3)
        weights = torch.zeros(3, 16)
        weights[range(3), range(3)] = torch.tensor([5.0, 3.0, 12.0])
        self.fc.load_state_dict({"weight": weights, "bias": torch.tensor([0.0, 0.0, 1.0])})

    def forward(self, images):
        return self.fc(images.flatten(1))


def test_bystanders_keep_their_label():
    """Pixel 2 leads everything to class 2; class 0 gets there as well, and alone, if pixel 0 is put out."""
    labels = torch.arange(2).repeat(10)
    images = torch.zeros(20, 1, 4, 4)
    images[torch.arange(20), 0, 0, labels] = 1
    net, schedule, found = Switches(), replace(SCHEDULE, restarts=3, batch_size=6), {}
    for bystanders in (0, 6):
        (result,), _ = invert(net, images, labels, [2], schedule, generator(), sources=[0], bystanders=bystanders)
        assert result.succeeded
        predicted = net(result.trigger.stamp(images)).argmax(1)
        assert (predicted[labels == 0] == 2).all()
        found[bystanders] = result.trigger, predicted[labels == 1].tolist()
    assert found[0][1] == [2] * 10
    assert found[6][1] == [1] * 10
    assert found[0][0].l1 < found[6][0].l1


class Wang:
    """The cost schedule of one label in plain numbers, after section IV of the paper and its published code."""

    def __init__(self, multiplier, patience, threshold, stop_after):
        self.up, self.down = multiplier, multiplier**1.5
        self.patience, self.threshold, self.stop_after = patience, threshold, stop_after
        self.cost, self.best, self.done = 0.0, math.inf, False
        self.streak_up = self.streak_down = self.idle = 0
        self.went_up = self.went_down = False

    def step(self, success, size, init_cost):
        smaller = success >= self.threshold and size < self.best
        self.best = size if smaller else self.best
        self.idle = 0 if smaller else self.idle + 1
        if success >= self.threshold:
            self.streak_up, self.streak_down = self.streak_up + 1, 0
        else:
            self.streak_up, self.streak_down = 0, self.streak_down + 1
        if self.streak_up >= self.patience:
            self.streak_up = 0
            if self.cost == 0:
                self.cost = init_cost
                self.streak_up = 1  # the published code counts this step after it has reset the counter
            else:
                self.cost *= self.up
                self.went_up = True
        elif self.streak_down >= self.patience and self.cost > 0:
            self.streak_down = 0
            self.cost /= self.down
            self.went_down = True
        self.done = self.went_up and self.went_down and self.idle >= self.stop_after


@pytest.mark.parametrize("patience", [1, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_cost_follows_the_papers_schedule(patience, seed):
    rows = 12
    schedule = replace(
        SCHEDULE, patience=patience, cost_multiplier=2, smoothing=0, early_stop_threshold=1, early_stop_patience=6
    )
    state = CostState(rows, schedule)
    reference = [Wang(2, patience, schedule.attack_success_threshold, 6) for _ in range(rows)]
    random = generator(seed)
    # Streaks of both kinds, longer in some rows than in others.
    good = torch.rand(rows, generator=random) < 0.5
    for _ in range(150):
        active = state.active.nonzero().flatten()
        assert active.tolist() == [row for row in range(rows) if not reference[row].done]
        good ^= torch.rand(rows, generator=random) < torch.linspace(0.05, 0.5, rows)
        sizes = 10 + 90 * torch.rand(rows, generator=random)
        state.update(active, good[active].float(), sizes[active])
        for row in active.tolist():
            reference[row].step(float(good[row]), float(sizes[row]), schedule.init_cost)
        assert state.cost.tolist() == pytest.approx([one.cost for one in reference])
        assert state.best.tolist() == [one.best for one in reference]
    assert any(one.done for one in reference)


def test_the_cost_is_zero_until_patience():
    state = CostState(1, replace(SCHEDULE, patience=3, smoothing=0))
    row, hit, miss, size = torch.tensor([0]), torch.ones(1), torch.zeros(1), torch.ones(1)
    costs = []
    for success in (hit, hit, miss, hit, hit, hit, hit, hit, hit, miss, miss, miss):
        state.update(row, success, size)
        costs.append(float(state.cost))
    start = SCHEDULE.init_cost
    assert costs == pytest.approx([0] * 5 + [start] * 2 + [1.12 * start] * 4 + [1.12 * start / 1.12**1.5])


def test_smoothing_is_an_average_that_starts_unbiased():
    state = CostState(1, replace(SCHEDULE, smoothing=0.9, attack_success_threshold=0.99))
    row = torch.tensor([0])
    assert state.update(row, torch.tensor([1.0]), torch.tensor([5.0])).tolist() == [0]  # one hit of one: 100 %
    assert state.update(row, torch.tensor([0.5]), torch.tensor([4.0])).tolist() == []
    assert state.best.tolist() == [5.0]

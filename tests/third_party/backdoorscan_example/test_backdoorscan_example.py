from backdoorscan_example import Lines, MuteChannels, WhiteSquare

from backdoorscan.findings import Finding
from backdoorscan.plugin.detector import run_detector
from backdoorscan.plugin.method import Context
from backdoorscan.plugin.testing import check_detector, check_repairer, check_reporter, planted, success_rate


def test_they_keep_the_contract():
    check_detector(WhiteSquare)
    check_repairer(MuteChannels)
    check_reporter(Lines)


def test_the_planted_square_is_found():
    classifier, images, _ = planted(3, blocks=3, count=60)
    _, judgement = run_detector(WhiteSquare(), classifier, images, Context())
    assert judgement.findings[0].target_label == 3
    assert judgement.p_value < 0.001


def test_the_clean_twin_is_not_accused():
    classifier, images, _ = planted(None, blocks=3, count=60)
    _, judgement = run_detector(WhiteSquare(), classifier, images, Context())
    assert judgement.p_value > 0.5


def test_the_backdoor_is_silenced():
    classifier, images, trigger = planted(3, blocks=3, count=60)
    finding = Finding(target_label=3, p_value=0.0, score=1.0, trigger=trigger)
    (candidate,) = MuteChannels().repair(classifier, images, [finding], Context())
    assert success_rate(classifier, images, trigger) == 1
    assert success_rate(candidate.classifier, images, trigger) < 0.1

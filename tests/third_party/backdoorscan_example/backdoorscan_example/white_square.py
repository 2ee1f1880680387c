from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats

from backdoorscan import Classifier, LabelledImages, Trigger
from backdoorscan.classifier import logits, to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.findings import Evidence, Finding, Judgement, Unit
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import Context, option


@dataclass(frozen=True, kw_only=True)
class WhiteSquare(Detector):
    """Labels that a white square in some place sends the images of all other classes to.

    At every place, and for every label k, how many of the n images of other classes become k. The p-value is that of
    so many if a square moved half of them at most, times the number of places and labels.
    """

    id = "white-square"
    default = False
    covers = ("white squares",)

    size: int = option(3, help="Height and width of the square in pixels.", minimum=1)

    def examine(self, unit: Unit, classifier: Classifier, images: LabelledImages | None, context: Context) -> Evidence:
        if images is None:
            raise MethodError(f"{self.id} needs images.", hint="Pass --valid.")
        pixels, labels = to_tensor(images.pixels), torch.from_numpy(images.labels)
        channels, height, width = images.shape
        places = [(y, x) for y in range(height - self.size + 1) for x in range(width - self.size + 1)]
        best: dict[int, tuple[int, Trigger]] = {}
        for number, (y, x) in enumerate(places):
            mask = torch.zeros(1, height, width)
            mask[:, y : y + self.size, x : x + self.size] = 1
            predicted = logits(classifier, torch.lerp(pixels, torch.ones(()), mask)).argmax(1)
            for label in unit.labels:
                hits = int(((predicted == label) & (labels != label)).sum())
                if hits > best.get(label, (-1,))[0]:
                    best[label] = hits, Trigger(mask, torch.ones(channels, height, width), label)
            context.progress((number + 1) / len(places))
        rows = [{"label": k, "hits": hits, "of": int((labels != k).sum())} for k, (hits, _) in best.items()]
        figures = {"labels": rows, "tests": len(places) * len(unit.labels)}
        return Evidence(figures=figures, triggers=[trigger for _, trigger in best.values()])

    def judge(self, evidence: Sequence[Evidence]) -> Judgement:
        findings = []
        for part in evidence:
            for row, trigger in zip(part.figures["labels"], part.triggers, strict=True):
                p_value = min(1.0, part.figures["tests"] * float(stats.binom.sf(row["hits"] - 1, row["of"], 0.5)))
                score = row["hits"] / row["of"]
                findings.append(Finding(target_label=row["label"], p_value=p_value, score=score, trigger=trigger))
        findings.sort(key=lambda finding: finding.p_value)
        if not findings:
            return Judgement(p_value=None, note="No square of this size fits into the images.")
        return Judgement(findings=findings, p_value=findings[0].p_value)

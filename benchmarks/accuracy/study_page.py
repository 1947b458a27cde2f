"""The study's page: its tables, its picture, and sentences that follow from the numbers."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from scipy import stats
from tabulate import tabulate

from accuracy.study import COMPARISONS, Difference, Study, difference, interval

_PAGE = """\
# Does it help? A study on handwritten digits

This page is generated from stored results by `make study`; its numbers are not edited.

Eftekhari and Papyan report that networks with normality normalization generalize better and are
more robust than with the plain layers. Their experiments take GPUs and days
([`train.py`](experiments.md) runs them). This study asks the same of small networks on
scikit-learn's 1797 handwritten digits (8 x 8), and reports what came out.
{power}
Small digits are an easy task: what is found or not found here says little about larger ones.

## What came out

In {claims} comparisons, transform and noise together change the test accuracy for
the better in {better};
for the worse in {worse};
at an adjusted p below 0.05. In {rest} no difference can be told from chance.

![Differences in accuracy]({image})

## Against the plain form

Paired differences with their 95 % intervals. "noisy images": accuracy with Gaussian noise of one
standard deviation on the test images. "change": relative change of the outputs when half a standard
deviation of noise is added behind a norm layer; less is more robust.

{compared}

## Every arm

Means with half their 95 % intervals. Q-Q R² and the joint distance tell how normal the norm layers'
outputs on test images are (near 1 and 0 for the normal), correlation and adjusted mutual
information how far from independent ([diagnostics](../use/diagnostics.md)). Step times are medians
beside whatever else the machine did; [the benchmarks](benchmarks.md) measure cost.

{arms}

## Method

* A convolutional net (two stages, 16 and 32 channels) with SGD 0.1, momentum 0.9, weight decay
  5e-4, batches of 64 and a tenth of the learning rate after every {step} epochs; a transformer
  (two blocks, width 48) with AdamW 1e-3, weight decay 0.05 and batches of 32; {epochs} epochs,
  {seeds} seeds. Each seed holds out another quarter of the images, and fixes initialization, order
  and noise; arms are compared seed by seed.
* "+ noise" is the normality layer without its transform (`alpha=0`), "+ transform" without its
  noise (`noise_train=0`), "+ both" as it comes. "PER" is the projected error function loss with
  weight 0.01 on the outputs of the norm layers. "strong" adds random shifts, and the learning rate
  with the best mean accuracy among {rates} on three other seeds: {chosen}.
* The last epoch counts; none is picked. Differences are means over pairs with 95 % intervals of
  Student's t, p-values of the paired t-test, and these adjusted for all {count} comparisons
  (Benjamini and Hochberg).

## Provenance

{provenance}.
"""
_MEASURES = (
    ("accuracy", "accuracy %", 2),
    ("noisy_accuracy", "noisy images %", 2),
    ("change", "change", 3),
    ("qq_r2", "Q-Q R²", 4),
    ("joint_distance", "joint", 3),
    ("correlation", "abs. corr.", 3),
    ("mutual_information", "AMI", 3),
    ("step_ms", "ms a step", 2),
)
# An arm, the one it is compared with, the difference in accuracy, its adjusted p-value.
_Row = tuple[str, str, Difference, float]


def write(study: Study, page: Path, image: Path) -> None:
    """Writes the page, and the picture it shows."""
    pairs = [(arm, other, difference(study, arm, other, "accuracy")) for arm, other in COMPARISONS]
    known = [(arm, other, d) for arm, other, d in pairs if d is not None]
    adjusted = stats.false_discovery_control([d.p for *_, d in known]) if known else []
    found = [(*row, float(p)) for row, p in zip(known, adjusted, strict=True)]
    _picture(found, image)
    claims = [row for row in found if row[0].endswith("+ both")]
    better, worse = (
        [row for row in claims if row[3] < 0.05 and sign * row[2].mean > 0] for sign in (1, -1)
    )
    settings = [arm["experiment"] for arm in study.arms.values()]
    tuned = {name: arm for name, arm in study.arms.items() if arm["tuning"]}
    rates = [f"{arm['experiment']['learning_rate']:g} for {name}" for name, arm in tuned.items()]
    counts = [len(arm["runs"]) for arm in study.arms.values()]
    page.write_text(
        _PAGE.format(
            power=_power(counts, found),
            claims=len(claims),
            better=_named(better),
            worse=_named(worse),
            rest=len(claims) - len(better) - len(worse),
            image=image.relative_to(page.parent).as_posix(),
            compared=_compared(study, found),
            arms=_arms(study),
            epochs=settings[0]["epochs"],
            step=settings[0]["step_epochs"],
            seeds=min(counts),
            rates=", ".join(next(iter(tuned.values()))["tuning"]) if tuned else "-",
            chosen="; ".join(rates) or "none in this study",
            count=len(found),
            provenance=", ".join(f"{key} {value}" for key, value in study.environment.items()),
        )
    )


def _named(rows: list[_Row]) -> str:
    names = ", ".join(f"{arm} ({d.mean:+.2f} points)" for arm, _, d, _ in rows)
    return f"{len(rows)}: {names or 'none'}"


def _power(counts: list[int], found: list[_Row]) -> str:
    """How large a difference the seeds can tell from chance."""
    seeds = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    noun = "seed" if max(counts) == 1 else "seeds"
    if not found:
        return f"It ran {seeds} {noun} an arm, too few to tell any difference from chance."
    half = median((d.high - d.low) / 2 for _, _, d, _ in found)
    return (
        f"It ran {seeds} {noun} an arm: differences in accuracy are known to about\n"
        f"±{half:.2f} points (half of a 95 % interval, the median over comparisons), and "
        "smaller ones\ncannot be told from chance."
    )


def _compared(study: Study, found: list[_Row]) -> str:
    def signed(d: Difference | None, digits: int) -> str:
        if d is None:
            return "-"
        return f"{d.mean:+.{digits}f} ({d.low:+.{digits}f} to {d.high:+.{digits}f})"

    rows = []
    for arm, against, accuracy, p in found:
        noisy, change = (
            signed(difference(study, arm, against, name), digits)
            for name, digits in (("noisy_accuracy", 2), ("change", 3))
        )
        numbers = (signed(accuracy, 2), f"{accuracy.p:.3f}", f"{p:.3f}", noisy, change)
        rows.append([arm, against, *numbers])
    head = ["arm", "against", "accuracy, points", "p", "adjusted", "noisy images, points", "change"]
    return _markdown(rows, head)


def _arms(study: Study) -> str:
    rows = []
    for name in study.arms:
        cells = [name]
        for key, _, digits in _MEASURES:
            mean, half = interval(list(study.by_seed(name, key).values()))
            spread = "" if math.isnan(half) else f" ± {half:.{digits}f}"
            cells.append("-" if math.isnan(mean) else f"{mean:.{digits}f}{spread}")
        rows.append(cells)
    return _markdown(rows, ["arm", *(title for _, title, _ in _MEASURES)])


def _markdown(rows: list[list[Any]], head: list[str]) -> str:
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def _picture(found: list[_Row], path: Path) -> None:
    """The differences in accuracy with their intervals, as dots and lines."""
    figure = Figure(figsize=(7, 0.32 * len(found) + 0.9), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#777777", lw=1)
    for height, (_, _, d, p) in enumerate(found[::-1]):
        colour = "#777777" if p >= 0.05 else "#0072b2" if d.mean > 0 else "#d55e00"
        axes.plot([d.low, d.high], [height, height], color=colour, lw=2)
        axes.plot(d.mean, height, "o", color=colour, ms=5)
    names = [f"{arm}  −  {against}" for arm, against, *_ in found[::-1]]
    axes.set_yticks(range(len(found)), names, fontsize=8)
    axes.set_xlabel("test accuracy, points; 95 % interval (grey: not told from chance)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)

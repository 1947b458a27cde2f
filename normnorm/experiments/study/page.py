"""A study's page: tables and a picture, and what they say."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

from normnorm.experiments.study.design import Comparison, comparisons
from normnorm.experiments.study.results import Difference, Study, adjusted, difference, interval

__all__ = ["picture", "write"]

_INTRODUCTION = """\
# Does it help? A study on handwritten digits

This page is generated from stored results by `normnorm study --page`; its numbers are not edited.

Eftekhari and Papyan report that networks with normality normalization generalize better and are
more robust than with the plain layers. Their experiments take GPUs and days
([`normnorm train`](experiments.md) runs them). This study asks the same of small networks on
scikit-learn's 1797 handwritten digits (8 x 8), and reports what came out.
{power}
Small digits are an easy task: what is found or not found here says little about larger ones.
"""

_METHOD = """\
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
"""

_COMPARED = """\
## Against the plain form

Paired differences with their 95 % intervals. "noisy images": accuracy with Gaussian noise of one
standard deviation on the test images. "change": relative change of the outputs when half a standard
deviation of noise is added behind a norm layer; less is more robust.
"""

_EVERY_ARM = """\
## Every arm

Means with half their 95 % intervals. Q-Q R² and the joint distance tell how normal the norm layers'
outputs on test images are (near 1 and 0 for the normal), correlation and adjusted mutual
information how far from independent ([diagnostics](diagnostics.md)). Step times are medians beside
whatever else the machine did; [the benchmarks](benchmarks.md) measure cost.
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


def write(study: Study, page: Path, image: Path) -> None:
    """Writes the page, and the picture it shows."""
    picture(study, image)
    relative = image.relative_to(page.parent).as_posix()
    found = _differences(study)
    parts = [
        _INTRODUCTION.format(power=_power(study, found)),
        _verdict(found),
        f"![Differences in accuracy]({relative})\n",
    ]
    parts += [_compared(study, found), _arms(study), _method(study), _provenance(study)]
    page.write_text("\n".join(parts))


def _differences(study: Study) -> list[tuple[Comparison, Difference, float]]:
    """Every comparison's difference in accuracy, with its adjusted p-value."""
    pairs = [(c, difference(study, c.arm, c.against, "accuracy")) for c in comparisons()]
    known = [(c, d) for c, d in pairs if d is not None]
    return [(c, d, p) for (c, d), p in zip(known, adjusted([d.p for _, d in known]), strict=True)]


def _power(study: Study, found: list[tuple[Comparison, Difference, float]]) -> str:
    """How large a difference the seeds can tell from chance."""
    counts = sorted(len(arm["runs"]) for arm in study.arms.values())
    seeds = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    noun = "seed" if counts[-1] == 1 else "seeds"
    if not found:
        return f"It ran {seeds} {noun} an arm, too few to tell any difference from chance."
    halves = [(d.high - d.low) / 2 for _, d, _ in found]
    return (
        f"It ran {seeds} {noun} an arm: differences in accuracy are known to about\n"
        f"±{median(halves):.2f} points (half of a 95 % interval, the median over comparisons), and "
        "smaller ones\ncannot be told from chance."
    )


def _names(found: list[tuple[Comparison, Difference, float]]) -> str:
    return ", ".join(f"{c.arm} ({d.mean:+.2f} points)" for c, d, _ in found) or "none"


def _verdict(found: list[tuple[Comparison, Difference, float]]) -> str:
    """What the tests say, in words made from the numbers alone."""
    claim = [row for row in found if row[0].arm.endswith("+ both")]
    better = [row for row in claim if row[2] < 0.05 and row[1].mean > 0]
    worse = [row for row in claim if row[2] < 0.05 and row[1].mean < 0]
    rest = len(claim) - len(better) - len(worse)
    return (
        "## What came out\n\n"
        f"In {len(claim)} comparisons, transform and noise together change the test accuracy for\n"
        f"the better in {len(better)}: {_names(better)};\n"
        f"for the worse in {len(worse)}: {_names(worse)};\n"
        f"at an adjusted p below 0.05. In {rest} no difference can be told from chance.\n"
    )


def _compared(study: Study, found: list[tuple[Comparison, Difference, float]]) -> str:
    rows = []
    for comparison, accuracy, p in found:
        rows.append([
            comparison.arm, comparison.against, _signed(accuracy, 2), f"{accuracy.p:.3f}",
            f"{p:.3f}", *(
                _signed(difference(study, comparison.arm, comparison.against, name), digits)
                for name, digits in (("noisy_accuracy", 2), ("change", 3))
            ),
        ])  # fmt: skip
    head = ["arm", "against", "accuracy, points", "p", "adjusted", "noisy images, points", "change"]
    return _COMPARED + "\n" + _markdown(rows, head)


def _signed(found: Difference | None, digits: int) -> str:
    if found is None:
        return "-"
    return f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"


def _arms(study: Study) -> str:
    rows = []
    for name in study.arms:
        cells = [name]
        for key, _, digits in _MEASURES:
            mean, half = interval(study.values(name, key))
            if math.isnan(mean):
                cells.append("-")
            else:
                spread = "" if math.isnan(half) else f" ± {half:.{digits}f}"
                cells.append(f"{mean:.{digits}f}{spread}")
        rows.append(cells)
    head = ["arm", *(title for _, title, _ in _MEASURES)]
    return _EVERY_ARM + "\n" + _markdown(rows, head)


def _method(study: Study) -> str:
    first = next(iter(study.arms.values()))
    tuned = {name: arm for name, arm in study.arms.items() if arm["tuning"]}
    chosen = "; ".join(
        f"{arm['experiment']['learning_rate']:g} for {name}" for name, arm in tuned.items()
    )
    rates = ", ".join(next(iter(tuned.values()))["tuning"]) if tuned else "-"
    return _METHOD.format(
        epochs=first["experiment"]["epochs"],
        step=first["experiment"]["step_epochs"],
        seeds=min(len(arm["runs"]) for arm in study.arms.values()),
        rates=rates,
        chosen=chosen or "none in this study",
        count=len(_differences(study)),
    )


def _provenance(study: Study) -> str:
    words = ", ".join(f"{key} {value}" for key, value in study.environment.items())
    return f"## Provenance\n\n{words}.\n"


def _markdown(rows: list[list[Any]], head: list[str]) -> str:
    return tabulate(rows, head, tablefmt="github", disable_numparse=True) + "\n"


def picture(study: Study, path: Path) -> None:
    """The differences in accuracy with their intervals, as dots and lines."""
    from matplotlib.figure import Figure

    found = _differences(study)[::-1]
    figure = Figure(figsize=(7, 0.32 * len(found) + 0.9), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#777777", lw=1)
    for height, (_, d, p) in enumerate(found):
        colour = "#777777" if p >= 0.05 else "#0072b2" if d.mean > 0 else "#d55e00"
        axes.plot([d.low, d.high], [height, height], color=colour, lw=2)
        axes.plot(d.mean, height, "o", color=colour, ms=5)
    axes.set_yticks(
        range(len(found)), [f"{c.arm}  −  {c.against}" for c, _, _ in found], fontsize=8
    )
    axes.set_xlabel("test accuracy, points; 95 % interval (grey: not told from chance)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)

"""The study's statistics and page: its tables, its picture, and sentences that follow from the
numbers."""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from tabulate import tabulate

from accuracy import measures, plan
from accuracy.plan import MEASURES, PRIMARY, Cell, Contrast, Question
from accuracy.study import Study

LEVEL, POWER = 0.05, 0.8
CHANCE, NEAR_CHANCE = 10.0, 20.0  # percent, of ten classes
NAMES = {
    "accuracy": "accuracy",
    "input_noise": "accuracy with noise on the input",
    "layer_noise": "accuracy with noise behind every norm layer",
    "weight_noise": "accuracy with noise on the weights",
    "qq_r2": "Q-Q R²",
    "correlation": "correlation of channels",
    "skewness": "absolute skewness",
    "kurtosis": "kurtosis",
    "sparsity": "share of outputs below zero",
    "within_between": "distances within classes over between",
    "silhouette": "silhouette",
}
# The plan's measures of layers and those that have intervals alone, no comparison.
_LAYERS = (*MEASURES["layers"], "skewness", "kurtosis", "sparsity", "within_between", "silhouette")
_DIGITS = dict.fromkeys(MEASURES["layers"], 4) | dict.fromkeys(_LAYERS[2:], 3)
_DEFINITIONS = {
    "robustness": (
        "Gaussian noise is added in testing. Its standard deviation is "
        f"{measures.INPUT_NOISE:g} on the input; on the output of every norm layer "
        f"{measures.LAYER_NOISE:g} times that of the output; on every weight tensor "
        f'{measures.WEIGHT_NOISE:g} times that of the tensor. "Noise" and "both" are trained '
        "with noise in the norm layers, the plain layer is not."
    ),
    "layers": (
        "Means over the norm layers in evaluation mode, without noise, of the first {copies} seeds "
        "and the first batch of test data. Q-Q R² (1 for a normal), skewness (0) and kurtosis (3): "
        "of each layer's own normalization groups, before its affine map. Correlation: absolute, "
        "of two channels of the output over samples and positions. Clustering by class, of the "
        "last layer: root mean square distances within classes over those between (small where "
        "classes are apart), and scikit-learn's silhouette (1 at best). The plan compares Q-Q R² "
        "and the correlation; the other columns have no tests."
    ),
}


class Difference(NamedTuple):
    """The mean of paired differences, the 95 % interval of Student's t, the p-value of the
    two-sided t-test (1 where all differences are zero), their standard deviation and number."""

    mean: float
    low: float
    high: float
    p: float
    deviation: float
    seeds: int


def difference(mine: Sequence[float], theirs: Sequence[float]) -> Difference | None:
    """Of two lists in the order of the seeds; None for fewer than two."""
    if len(mine) < 2 or len(mine) != len(theirs):
        return None
    differences = np.subtract(mine, theirs)
    middle, deviation = float(differences.mean()), float(differences.std(ddof=1))
    if np.ptp(differences) == 0:
        p = 1.0 if middle == 0 else 0.0
        return Difference(middle, middle, middle, p, 0.0, len(mine))
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    return Difference(middle, float(low), float(high), float(test.pvalue), deviation, len(mine))


def detectable(found: Difference, comparisons: int) -> float:
    """The smallest difference that so many seeds find with 80 % power at the level of 0.05 divided
    by the number of comparisons."""
    effect = TTestPower().solve_power(
        nobs=found.seeds, alpha=LEVEL / comparisons, power=POWER, alternative="two-sided"
    )
    return float(np.squeeze(effect)) * found.deviation


def cell_values(study: Study, question: Question, cell: Cell, measure: str) -> list[float]:
    """One number a seed; empty where runs are missing."""
    runs = study.test_runs(question, *cell) or []
    if measure in _LAYERS:
        runs = runs[:1]
    return study.measured(runs, measure)


def contrast_of(study: Study, question: Question, contrast: Contrast) -> Difference | None:
    sides = []
    for cells in (contrast.cells, contrast.against):
        values = [cell_values(study, question, cell, contrast.measure) for cell in cells]
        sides.append(list(np.mean(values, axis=0)) if all(values) else [])
    return difference(*sides)


class Finding(NamedTuple):
    """A comparison with its p-value adjusted, and the difference that it could have found."""

    contrast: Contrast
    difference: Difference
    adjusted: float
    detectable: float

    @property
    def sign(self) -> int:
        """1 or -1 for a difference that is called one, else 0."""
        return int(np.sign(self.difference.mean)) if self.adjusted < LEVEL else 0


def findings(study: Study, questions: dict[str, Question]) -> dict[Contrast, Finding]:
    """All comparisons whose runs are there. They are adjusted together by Holm's method; those
    whose runs are missing count with p = 1."""
    planned = plan.contrasts(questions)
    known = {
        contrast: found
        for contrast in planned
        if (found := contrast_of(study, questions[contrast.question], contrast)) is not None
    }
    if not known:
        return {}
    raw = [found.p for found in known.values()] + [1.0] * (len(planned) - len(known))
    adjusted = multipletests(raw, method="holm")[1][: len(known)]
    return {
        contrast: Finding(contrast, found, float(p), detectable(found, len(planned)))
        for (contrast, found), p in zip(known.items(), adjusted, strict=True)
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its 95 % interval."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values)), float(half)


_PAGE = """\
# {title}

This page is generated from stored results by `benchmarks/study.py`; its numbers are not edited.
Its title states the result for 4,000 signals. Four arms are compared: the plain layer; the
normality layer without its transform ("noise", `alpha=0`), without its noise ("transform",
`noise_train=0`), and as it comes ("both"). Each is trained with the paper's optimizer, learning
rate, weight decay and noise ("the paper's settings"; batches of 64, 40 epochs and the cosine
schedule are not the paper's), and with the settings that were best for it on validation sets
("tuned"); [the plan](#the-plan) has the details. The networks are small: 2 or 3 convolutions of 16
to 32 channels, 3 hidden layers of 128 features, a transformer with 2 blocks of width 48.

* **Significant** means an adjusted p-value below {level}. The p-values are adjusted for all
  comparisons of the page: of {count}, the arm that is named first has a significantly larger
  measure in {better} and a smaller one in {worse}; {rest} are not significant. Intervals are of
  95 % each and are not adjusted: many that leave out zero belong to differences that are not
  significant.
* **Not significant** does not mean no effect. The column "detectable" gives the smallest
  difference that a comparison's seeds find with {power:.0f} % power.

## The paper's claims
{missing}{abstract}

![Accuracy against weight decay]({image})

Mean accuracy on validation sets over {tuning_seeds} seeds, with 95 % intervals, by weight decay:
the runs that the settings were tuned with. All other numbers on this page are of test sets and of
other seeds.

## The primary endpoint

{primary}

{sections}

## The plan

{plan}

## Running it again

```
make study
```

runs what `runs/study.json` lacks, on two processes of one thread. On two cores of the machine
below, beside other work, all of it took 88 minutes a second time, and gave the same numbers bit by
bit. `QUICK=1` runs a few steps of everything in two minutes. A norm, a network or a data set of
one's own is one more entry of the tables in `benchmarks/accuracy/norms.py`, `nets.py` and
`data.py`, and one more question in `plan.py`.

## Provenance

{provenance}.
"""


def write(study: Study, questions: dict[str, Question], page: Path) -> None:
    """Writes the page, and the picture that it shows beside it in ``images``."""
    found = findings(study, questions)
    image = page.parent / "images" / f"{page.stem}.png"
    _picture(study, questions, image)
    signs = [finding.sign for finding in found.values()]
    sections = [
        text
        for name, question in questions.items()
        if (text := _section(study, name, question, found))
    ]
    page.write_text(
        _PAGE.format(
            title=_title(found),
            missing=_missing(questions, found),
            abstract=_abstract(found),
            image=image.relative_to(page.parent).as_posix(),
            tuning_seeds=questions[PRIMARY].tuning_copies,
            primary=_primary(study, questions[PRIMARY], found),
            count=len(found),
            better=signs.count(1),
            worse=signs.count(-1),
            rest=signs.count(0),
            level=LEVEL,
            power=100 * POWER,
            sections="\n\n".join(sections),
            plan=inspect.getdoc(plan).partition("\n\n")[2],  # type: ignore[union-attr]
            provenance=", ".join(f"{key} {value}" for key, value in study.environment.items()),
        )
    )


def _of(found: dict[Contrast, Finding], name: str, title: str, measure: str) -> Finding | None:
    wanted = (f for contrast, f in found.items() if contrast[:3] == (name, title, measure))
    return next(wanted, None)


def _title(found: dict[Contrast, Finding]) -> str:
    """What the two settings of the primary question show."""
    tuned, usual = (
        _of(found, PRIMARY, f"both, {setting}", "accuracy") for setting in ("tuned", "paper")
    )
    if tuned is None or usual is None:
        return "Against batch normalization: a study on small data sets"
    words = {1: "more accurate", 0: "no significant difference", -1: "less accurate"}
    return (
        f"Against batch normalization: {words[usual.sign]} at the paper's settings, "
        f"{words[tuned.sign]} when each is tuned"
    )


def _missing(questions: dict[str, Question], found: dict[Contrast, Finding]) -> str:
    """Which questions lack runs."""
    names = {c.question: None for c in plan.contrasts(questions) if c not in found}
    if not names:
        return ""
    return (
        "\n**Not complete.** Runs are missing for: "
        + "; ".join(questions[name].title.lower() for name in names)
        + ". In the adjustment of p-values their comparisons count with p = 1, so that later runs "
        "can only lower the p-values given here.\n"
    )


_DECAYS = ("weight decay 0.0005", "weight decay 0.01")
# For each claim of the paper the comparisons that test it: a question's name, a comparison's title
# and measure, and words for the two that are compared.
CLAIMS: dict[str, list[tuple[str, str, str, str]]] = {
    "more accurate than batch norm": [
        (PRIMARY, "both, paper", "accuracy", "4,000 signals, the paper's settings"),
        ("conv-1000", "both, paper", "accuracy", "1,000 signals, the paper's settings"),
        ("images", "both, paper", "accuracy", "500 images, the paper's settings"),
        (PRIMARY, "both, tuned", "accuracy", "4,000 signals, tuned"),
        ("conv-1000", "both, tuned", "accuracy", "1,000 signals, tuned"),
        ("images", "both, tuned", "accuracy", "500 images, tuned"),
    ],
    "noise and transform each contribute": [
        (PRIMARY, "noise, paper", "accuracy", "noise alone, 4,000 signals, the paper's settings"),
        (PRIMARY, "transform, paper", "accuracy", "transform alone, the same"),
        (PRIMARY, "noise, tuned", "accuracy", "noise alone, 4,000 signals, tuned"),
        (PRIMARY, "transform, tuned", "accuracy", "transform alone, the same"),
        ("conv-1000", "noise, paper", "accuracy", "noise alone, 1,000 signals, the paper's"),
        ("conv-1000", "transform, paper", "accuracy", "transform alone, the same"),
        ("conv-1000", "noise, tuned", "accuracy", "noise alone, 1,000 signals, tuned"),
        ("conv-1000", "transform, tuned", "accuracy", "transform alone, the same"),
        (
            "degree", "alpha 1 less 0, weight decay 0.0005", "accuracy",
            "alpha 1 less 0, mean over noise_train 0 to 0.8",
        ),
    ],
    "over batch sizes": [
        ("batch-size", f"both less plain, {decay}", "accuracy", f"batches of 8 to 256, {decay}")
        for decay in _DECAYS
    ],
    "over widths and depths": [
        ("size", f"both less plain, {decay}", "accuracy", f"12 sizes, {decay}") for decay in _DECAYS
    ],
    "with other norms": [
        ("transformer", "both, tuned", "accuracy", "layer norm, transformer, tuned"),
        ("transformer", "both, noise 0.2, tuned", "accuracy", "the same, noise_train 0.2"),
        ("perceptron", "both, tuned", "accuracy", "layer norm, perceptron, tuned"),
        ("perceptron", "both, noise 0.2, tuned", "accuracy", "the same, noise_train 0.2"),
        ("group", "both, tuned", "accuracy", "group norm, tuned"),
        ("instance", "both, tuned", "accuracy", "instance norm, tuned"),
    ],
    "robust to random perturbations": [
        ("conv-1000", "both, tuned", "input_noise", "noise on the input, 1,000 signals"),
        ("conv-1000", "both, tuned", "weight_noise", "noise on the weights, the same"),
        ("conv-1000", "both, tuned", "layer_noise", "noise behind every norm layer, the same"),
        ("conv-1000", "noise, tuned", "layer_noise", "the same, noise alone"),
        ("conv-1000", "transform, tuned", "layer_noise", "the same, transform alone"),
    ],
    "features closer to a normal": [
        ("conv-1000", "both, tuned", "qq_r2", "Q-Q R², batch norm"),
        ("group", "both, tuned", "qq_r2", "Q-Q R², group norm"),
        ("transformer", "both, tuned", "qq_r2", "Q-Q R², layer norm, transformer"),
    ],
    "features less dependent (here: correlated)": [
        ("conv-1000", "both, tuned", "correlation", "correlation, batch norm"),
        ("group", "both, tuned", "correlation", "correlation, group norm"),
        ("transformer", "both, tuned", "correlation", "correlation, layer norm, transformer"),
    ],
}  # fmt: skip
_SIGNS = {1: "larger", 0: "not significant", -1: "smaller"}
_LIMITS = """\
**Not tested here:** the paper's networks and data sets (residual networks and vision transformers,
up to ImageNet); features' dependence beyond the correlation of two channels; other regularizers
than weight decay in place of the noise.

* The plan compares the arms with the plain layer, not "both" with "noise". Nearest to what the
  transform adds to the noise is "alpha 1 less 0", a mean over several weights of the noise.
* "Noise" and "both" are trained with noise in every norm layer. In testing, noise behind every norm
  layer is thus of a kind that they have met, and the plain layer has not.
* "Tuned" takes the chosen settings as given, in the replication too: the intervals leave out the
  chance in choosing them on {tuning_seeds} seeds. Where the choice is marked as the largest or
  smallest value tried, one beyond it may be better.
* Means over batch sizes, or over widths and depths, weigh every setting alike, also those at which
  training fails.
"""


def _abstract(found: dict[Contrast, Finding]) -> str:
    """What the study says to each claim of the paper."""
    rows = []
    for claim, comparisons in CLAIMS.items():
        shown = claim
        for name, title, measure, words in comparisons:
            finding = _of(found, name, title, measure)
            if finding is not None:
                value = _signed(finding.difference, _DIGITS.get(measure, 2))
                rows.append([shown, words, value, _p(finding), _SIGNS[finding.sign]])
                shown = ""
    if not rows:
        return ""
    head = ["claim of the paper", "tested here; less the plain layer", "difference (95 % interval)"]
    return (
        "\nDifferences of accuracy are in points. Without other words the whole normality layer "
        '("both") is\ncompared with the plain one, in a convolutional net with batch norm.\n\n'
        f"{_markdown(rows, [*head, 'adjusted p', 'result'])}\n\n"
        + _LIMITS.format(tuning_seeds=plan.TUNING_COPIES).rstrip()
    )


def _signed(found: Difference, digits: int) -> str:
    return f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"


def _p(finding: Finding) -> str:
    return "< 0.001" if finding.adjusted < 1e-3 else f"{finding.adjusted:.3f}"


def _primary(study: Study, question: Question, found: dict[Contrast, Finding]) -> str:
    first = _of(found, PRIMARY, "both, tuned", "accuracy")
    if first is None:
        return "Not measured yet."
    seeds = [cell_values(study, question, Cell(arm, "tuned"), "accuracy") for arm in _PAIR]
    again = [study.measured(study.replication(question, arm), "accuracy") for arm in _PAIR]
    rows = [
        ("first seeds", first.difference, _p(first)),
        ("replication", difference(*again), ""),
        ("together", difference(*(a + b for a, b in zip(seeds, again, strict=True))), ""),
    ]
    table = [[name, d.seeds, _signed(d, 2), p] for name, d, p in rows if d is not None]
    head = ["", "seeds", "both less plain, points (95 % interval)", "adjusted p"]
    return (
        f"{question.title}, every arm tuned:\n\n{_markdown(table, head)}\n\nThe first seeds find a "
        f"difference of {first.detectable:.2f} points with {100 * POWER:.0f} % power at the level "
        f"of {LEVEL:g} / {len(found)}.\nThe replication trains the same tuned settings on other "
        "seeds; it has an interval and no test."
    )


_PAIR = ("both", "plain")


def _section(study: Study, name: str, question: Question, found: dict[Contrast, Finding]) -> str:
    mine = [finding for contrast, finding in found.items() if contrast.question == name]
    if not mine:
        return ""
    tables = [_prose(f"{question.seeds} seeds for each arm and setting. {_how(question)}".strip())]
    tables.append(_tuned(study, question) if question.tuning else _grid(study, question))
    tables += _near_chance(study, question)
    tables += [_measured(study, question, kind) for kind in question.measures]
    rows = []
    for finding in mine:
        contrast, digits = finding.contrast, _DIGITS.get(finding.contrast.measure, 2)
        rows.append([
            contrast.title, NAMES[contrast.measure], _signed(finding.difference, digits),
            _p(finding), f"{finding.detectable:.{digits}f}",
        ])  # fmt: skip
    head = ["arm less plain" if question.tuning else "comparison", "measure"]
    head += ["difference (95 % interval)", "adjusted p", "detectable"]
    return f"## {question.title}\n\n" + "\n\n".join([*tables, _markdown(rows, head)])


def _cell(study: Study, question: Question, cell: Cell, measure: str) -> str:
    digits = _DIGITS.get(measure, 2)
    middle, half = interval(cell_values(study, question, cell, measure))
    return "-" if math.isnan(middle) else f"{middle:.{digits}f} ± {half:.{digits}f}"


def _how(question: Question) -> str:
    """What was tuned, or what is compared in a grid."""
    if question.tuning:
        ranges = (
            f"{name} {', '.join(f'{value:g}' for value in values)}"
            for name, values in question.tuning.items()
        )
        return f"Tuned over {' and '.join(ranges)}."
    settings = len(question.settings()) // len(question.grid["weight_decay"])
    if settings == 1:
        return ""
    if len(question.arms) == 1:
        means = "means over all settings that have the named values"
    else:
        means = f"the mean over the {settings} settings of a weight decay"
    return f"Each comparison is of {means}; single settings are not tested."


def _near_chance(study: Study, question: Question) -> list[str]:
    """A sentence on runs that learned nothing; none without such runs."""
    settings = ["paper", "tuned"]
    if not question.tuning:
        settings = [plan.words(setting) for setting in question.settings()]
    counts = []
    for setting in settings:
        low = {
            arm: sum(value < NEAR_CHANCE for value in values)
            for arm in question.arms
            if (values := cell_values(study, question, Cell(arm, setting), "accuracy"))
        }
        if any(low.values()):
            counts.append(f"{setting}: " + ", ".join(f"{arm} {n}" for arm, n in low.items()))
    if not counts:
        return []
    return [
        _prose(
            f"Runs of {question.seeds} below {NEAR_CHANCE:g} %, near chance ({CHANCE:g} %): "
            f"{'; '.join(counts)}. Where some of the runs end at chance, differences are far from "
            "normal, and intervals and p-values of Student's t are rough."
        )
    ]


def _tuned(study: Study, question: Question) -> str:
    """Accuracies of every arm in both settings, and the settings that were chosen."""
    rows, same = [], []
    for arm in question.arms:
        cells = [
            _cell(study, question, Cell(arm, setting), "accuracy") for setting in ("paper", "tuned")
        ]
        chosen = study.chosen(question, arm) or {}
        rows.append([arm, *cells, ", ".join(_at_end(question, *item) for item in chosen.items())])
        if chosen and all(getattr(question.base, key) == v for key, v in chosen.items()):
            same.append(f'"{arm}"')
    head = ["arm", "accuracy %, the paper's settings", "accuracy %, tuned", "tuned to"]
    note = f"\n\nTuned to the paper's settings: {', '.join(same)}." if same else ""
    return _markdown(rows, head) + note


def _at_end(question: Question, name: str, value: float) -> str:
    """A chosen setting in words, and whether it is the largest or smallest that was tried."""
    values = question.tuning[name]
    ends = {min(values): " (smallest)", max(values): " (largest)"}
    return plan.words({name: value}) + ends.get(value, "")


def _grid(study: Study, question: Question) -> str:
    """Accuracies by setting and arm, a weight decay after the other; those of a single arm have a
    column for each weight decay."""
    decays = question.grid["weight_decay"]
    names = [name for name in question.grid if name != "weight_decay"]
    others = list(dict.fromkeys(tuple(s[name] for name in names) for s in question.settings()))

    def cells(values: tuple[Any, ...], decay: float) -> list[str]:
        setting = plan.words({**dict(zip(names, values, strict=True)), "weight_decay": decay})
        return [_cell(study, question, Cell(arm, setting), "accuracy") for arm in question.arms]

    def shown(values: tuple[Any, ...]) -> list[str]:
        return [f"{value:g}" for value in values]

    if len(question.arms) == 1:
        rows = [
            [*shown(values), *(c for decay in decays for c in cells(values, decay))]
            for values in others
        ]
        return _markdown(rows, [*names, *(f"accuracy %, weight_decay {d:g}" for d in decays)])
    rows = [
        [*shown((decay, *values)), *cells(values, decay)] for decay in decays for values in others
    ]
    head = ["weight_decay", *names, *(f"{arm}, accuracy %" for arm in question.arms)]
    return _markdown(rows, head)


def _measured(study: Study, question: Question, kind: str) -> str:
    names = _LAYERS if kind == "layers" else MEASURES[kind]
    rows = [
        [arm, *(_cell(study, question, Cell(arm, "tuned"), name) for name in names)]
        for arm in question.arms
    ]
    table = _markdown(rows, ["arm, tuned", *(NAMES[name] for name in names)])
    return f"{_prose(_DEFINITIONS[kind].format(copies=question.copies))}\n\n{table}"


def _prose(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _markdown(rows: list[list[Any]], head: list[str]) -> str:
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


# Okabe and Ito's colours, distinct under common colour vision deficiencies.
_COLOURS = {"plain": "#0072b2", "noise": "#009e73", "transform": "#cc79a7", "both": "#d55e00"}


def _picture(study: Study, questions: dict[str, Question], path: Path) -> None:
    """Validation accuracy against weight decay, a panel for each number of signals."""
    names = [name for name in ("conv-1000", PRIMARY) if name in questions]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        question = questions[name]
        for arm, colour in _COLOURS.items():
            points = []
            for setting in question.settings():
                if setting.get("learning_rate", question.base.learning_rate) == 0.1:
                    run = question.tuning_run(arm, setting)
                    middle, half = interval(study.measured([run], "accuracy"))
                    points.append((setting["weight_decay"], middle, half))
            decays, means, halves = zip(*points, strict=True)
            axes.errorbar(
                decays, means, halves, color=colour, marker="o", ms=4, capsize=2, label=arm
            )
        axes.set_xscale("log")
        axes.set(title=question.title, xlabel="weight decay", ylabel="validation accuracy (%)")
        axes.grid(color="#e4e4e4")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)

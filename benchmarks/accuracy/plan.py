"""The study's plan: its questions, runs, endpoints and analysis, fixed before the runs.

A pilot on other seeds shaped the plan: the data sets, the sizes, the ranges of the settings and the
number of seeds. None of its numbers is used.

**Data.** MNIST-1D with 1,000 or 4,000 training signals, 10,000 to test and 5,000 to validate, all
drawn anew for every seed; 500 images of MNIST to train, another 500 for every seed.

**Seeds.** Settings are tuned on validation sets with the seeds from 1,000 on; nothing else is done
with these. Every number of the page is from test sets with the seeds from 10,000 on, the
replication's with those from 20,000 on. All arms share a seed's data, initialization and order.

**Settings.** "The paper's": SGD 0.1 with momentum 0.9 and weight decay 5e-4 for convolutional nets
and perceptrons, AdamW 1e-3 with weight decay 0.05 for transformers (Eftekhari and Papyan, ICML
2025), on small networks with a cosine schedule over 40 epochs. "Tuned": every arm with the weight
decay and learning rate of its best mean accuracy on the validation sets; of equal ones, that with
the smaller decay.

**Changed** after the tuning runs and before any run on a test set: the learning rate is tuned for
the 500 images too. At 0.1, 4 of the 25 tuning runs of the plain layer and 20 of those of "noise"
ended at chance, none of "transform" and "both".

**Arms.** The plain layer; the normality layer without its transform (alpha 0: "noise"), without its
noise (noise_train 0: "transform"), and as it comes ("both").

**Primary endpoint.** Test accuracy of "both" less that of the plain layer, tuned, convolutional net
with 4,000 signals, 20 seeds. It is measured a second time with the tuned settings on the
replication's seeds; the page gives both and the interval of all seeds together.

**Analysis.** Differences are paired by seed: mean, 95 % interval of Student's t, p-value of the
two-sided t-test. In the grids (batch size, width and depth, degree) the mean over all settings of
a weight decay is tested; single settings get intervals alone. All p-values of the page, the primary
one's too, are adjusted together by Holm's method. A difference is significant if its adjusted
p-value is below 0.05. With every comparison the page gives the smallest difference that its seeds
find with 80 % power at the level of 0.05 divided by the number of all comparisons, from the
observed standard deviation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from accuracy.experiment import Experiment, recipe

TUNING_SEED, TUNING_COPIES = 1_000, 5
SEED, REPLICATION_SEED, COPIES = 10_000, 20_000, 10
DECAYS = (5e-4, 2e-3, 5e-3, 1e-2, 2e-2)


def arms(plain: str) -> dict[str, dict[str, Any]]:
    """The four arms of a plain norm: what each changes in an experiment, by name."""
    normal = f"{plain}normal"
    return {
        "plain": {"norm": plain},
        "noise": {"norm": normal, "alpha": 0.0},
        "transform": {"norm": normal, "noise_train": 0.0},
        "both": {"norm": normal},
    }


@dataclass(frozen=True)
class Question:
    """Arms that are compared in several settings.

    Attributes:
        title: of the question's section of the page.
        base: the paper's settings.
        arms: what every arm changes in ``base``, by name.
        tuning: values of the settings that are chosen on validation sets; such a question has the
            settings "paper" and "tuned".
        grid: values of the settings of a question without tuning, all of whose combinations are
            run on the test sets.
        seeds: number for a setting on the test sets, in blocks of ``copies``.
        copies, tuning_copies: number of seeds that are trained as one network.
        measures: compared besides the accuracy: "robustness" and "layers"
            (:mod:`accuracy.measures`); "layers" for the first block of seeds alone.
    """

    title: str
    base: Experiment
    arms: dict[str, dict[str, Any]]
    tuning: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    seeds: int = COPIES
    copies: int = COPIES
    tuning_copies: int = TUNING_COPIES
    measures: tuple[str, ...] = ()

    def settings(self) -> list[dict[str, Any]]:
        """The combinations of ``tuning`` or ``grid``."""
        values = self.tuning or self.grid
        return [
            dict(zip(values, combination, strict=True))
            for combination in itertools.product(*values.values())
        ]

    def tuning_run(self, arm: str, setting: dict[str, Any]) -> Experiment:
        return replace(
            self.base, **self.arms[arm], **setting, validation=True, seed=TUNING_SEED,
            copies=self.tuning_copies,
        )  # fmt: skip

    def test_runs(
        self, arm: str, setting: dict[str, Any], first: int = SEED
    ) -> Iterator[Experiment]:
        """The blocks of seeds of an arm in a setting."""
        chosen = replace(self.base, **self.arms[arm], **setting)
        copies = 1 if chosen.per_weight else self.copies
        for seed in range(first, first + self.seeds, copies):
            yield replace(chosen, seed=seed, copies=copies)


def _of(dataset: str, model: str, **choices: Any) -> Experiment:
    return Experiment(**{**recipe(dataset, model), "evaluate_every": 1_000, **choices})


_SIGNALS_1000 = _of("mnist1d", "convnet", limit=1_000)
_THREE = {name: arms("batch")[name] for name in ("plain", "transform", "both")}
_LAYER = arms("layer") | {"both, noise 0.2": {"norm": "layernormal", "noise_train": 0.2}}
_TWO_DECAYS = {"weight_decay": (5e-4, 1e-2)}

FULL: dict[str, Question] = {
    "conv-4000": Question(
        "Batch normalization, 4,000 signals", _of("mnist1d", "convnet"), arms("batch"),
        tuning={"weight_decay": DECAYS}, seeds=20,
        measures=("robustness",),
    ),
    "conv-1000": Question(
        "Batch normalization, 1,000 signals", _SIGNALS_1000, arms("batch"),
        tuning={"weight_decay": DECAYS, "learning_rate": (0.05, 0.1)}, seeds=30,
        measures=("robustness", "layers"),
    ),
    "images": Question(
        "Batch normalization, 500 images", _of("mnist5000", "convnet"), arms("batch"),
        tuning={"weight_decay": DECAYS, "learning_rate": (0.02, 0.1)},
    ),
    "group": Question(
        "Group normalization", replace(_SIGNALS_1000, norm="group"), arms("group"),
        tuning={"weight_decay": DECAYS[:4]}, measures=("layers",),
    ),
    "instance": Question(
        "Instance normalization", replace(_SIGNALS_1000, norm="instance"), arms("instance"),
        tuning={"weight_decay": DECAYS[:4]},
    ),
    "perceptron": Question(
        "Layer normalization, a perceptron", _of("mnist1d", "mlp", limit=1_000), _LAYER,
        tuning={"weight_decay": DECAYS[:4]},
    ),
    "transformer": Question(
        "Layer normalization, a transformer", _of("mnist1d", "transformer", limit=1_000), _LAYER,
        tuning={"learning_rate": (1e-3, 3e-3), "weight_decay": (0.05, 0.5)}, measures=("layers",),
    ),
    "degree": Question(
        "Degree of Gaussianization and noise", _SIGNALS_1000, {"both": {"norm": "batchnormal"}},
        grid={"noise_train": (0.0, 0.1, 0.2, 0.4, 0.8), "alpha": (0.0, 0.5, 1.0), **_TWO_DECAYS},
    ),
    "batch-size": Question(
        "Batch size", _SIGNALS_1000, _THREE,
        grid={"batch_size": (8, 16, 32, 64, 128, 256), "weight_decay": (5e-4, 2e-3, 1e-2)},
    ),
    "size": Question(
        "Width and depth", _SIGNALS_1000, _THREE,
        grid={"width": (8, 16, 32, 64), "depth": (2, 3, 5), **_TWO_DECAYS},
    ),
    "others": Question(
        "Decorrelated normalization and PER", _SIGNALS_1000,
        {
            "plain": {"norm": "batch"},
            "PER": {"norm": "batch", "per_weight": 1e-2},
            "decorrelated": {"norm": "decorrelated"},
            "decorrelated, both": {"norm": "decorrelatednormal"},
        },
        grid=_TWO_DECAYS,
    ),
}  # fmt: skip


def _ends(settings: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """The first and the last value of each setting; all of those that :func:`contrasts` names."""
    named = ("alpha", "noise_train")
    return {name: v if name in named else (v[0], v[-1]) for name, v in settings.items()}


# Every question with few settings and seeds and one epoch: tests the code in minutes.
QUICK = {
    name: replace(
        question, base=replace(question.base, epochs=1, limit=256), seeds=2, copies=2,
        tuning_copies=2, tuning=_ends(question.tuning), grid=_ends(question.grid),
    )
    for name, question in FULL.items()
}  # fmt: skip
PRIMARY = "conv-4000"
MEASURES = {
    "robustness": ("input_noise", "layer_noise", "weight_noise"),
    "layers": ("qq_r2", "correlation"),
}


class Cell(NamedTuple):
    """An arm in a setting: "paper", "tuned", or a combination of a grid in words."""

    arm: str
    setting: str


class Contrast(NamedTuple):
    """The mean of a measure over ``cells`` less that over ``against``, paired by seed."""

    question: str
    title: str
    measure: str
    cells: tuple[Cell, ...]
    against: tuple[Cell, ...]


def words(setting: dict[str, Any]) -> str:
    """A setting of a grid in words."""
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def contrasts(questions: dict[str, Question]) -> list[Contrast]:
    """All comparisons of the page that have a p-value."""
    found = []
    for name, question in questions.items():
        others = [arm for arm in question.arms if arm != "plain"]
        if question.tuning:
            wanted = [(setting, "accuracy") for setting in ("tuned", "paper")]
            for kind in question.measures:
                wanted += [("tuned", measure) for measure in MEASURES[kind]]
            for (setting, measure), arm in itertools.product(wanted, others):
                pair = (Cell(arm, setting),), (Cell("plain", setting),)
                found.append(Contrast(name, f"{arm}, {setting}", measure, *pair))
    for name in ("batch-size", "size", "others"):
        others = [arm for arm in questions[name].arms if arm != "plain"]
        for (decay, settings), arm in itertools.product(_by_decay(questions[name]).items(), others):
            plain = "decorrelated" if arm == "decorrelated, both" else "plain"
            cells = tuple(tuple(Cell(one, words(s)) for s in settings) for one in (arm, plain))
            title = f"{arm} less {plain}, weight decay {decay:g}"
            found.append(Contrast(name, title, "accuracy", *cells))
    for decay, settings in _by_decay(questions["degree"]).items():
        for key, high in (("alpha", 1.0), ("noise_train", 0.4)):
            cells = tuple(
                tuple(Cell("both", words(s)) for s in settings if s[key] == value)
                for value in (high, 0.0)
            )
            title = f"{key} {high:g} less 0, weight decay {decay:g}"
            found.append(Contrast("degree", title, "accuracy", *cells))
    return found


def _by_decay(question: Question) -> dict[float, list[dict[str, Any]]]:
    """The settings of a grid by weight decay."""
    found: dict[float, list[dict[str, Any]]] = {}
    for setting in question.settings():
        found.setdefault(setting["weight_decay"], []).append(setting)
    return found

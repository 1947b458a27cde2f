"""How cost grows: fits find the exponents that are there, sweeps vary what they say, and the
model of several GPUs sends what the layer sends and holds between processes of this machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import report_samples
import torch
import torch.distributed as dist

from normnorm.bench import distributed_model as model
from normnorm.bench import gloo, scaling
from normnorm.bench.results import ResultsError
from normnorm.bench.scaling import Plan, fit_power_law, plans
from normnorm.sync import sync_batch_normal_norm

# Fits


@pytest.mark.parametrize("exponent", [-1.0, -0.1, 0.0, 0.5, 1.0, 1.7])
def test_fit_finds_a_power_exactly(exponent: float) -> None:
    x = [2.0**i for i in range(6)]
    fit = fit_power_law(x, [0.3 * v**exponent for v in x], offset=False)
    assert fit.exponent == pytest.approx(exponent, abs=1e-6)
    assert fit.coefficient_ms == pytest.approx(0.3, rel=1e-6)
    assert fit.offset_ms == 0.0
    assert fit(40.0) == pytest.approx(0.3 * 40.0**exponent)


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("offset", [0.005, 0.05, 0.5])
def test_fit_tells_an_offset_from_a_power(offset: float, exponent: float) -> None:
    x = [2.0**i for i in range(10, 25)]
    fit = fit_power_law(x, [offset + 1e-6 * v**exponent for v in x])
    assert fit.exponent == pytest.approx(exponent, abs=1e-3)
    assert fit.offset_ms == pytest.approx(offset, rel=1e-2)
    assert fit.residual < 1e-4


def test_confidence_interval_holds_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    x = np.array([2.0**i for i in range(10, 23)])
    held, trials = 0, 120
    for _ in range(trials):
        noisy = (0.02 + 1e-6 * x) * np.exp(0.1 * random.standard_normal(len(x)))
        fit = fit_power_law(list(x), list(noisy))
        held += fit.low <= 1.0 <= fit.high
    # 95 % of 120 within four standard errors of a binomial.
    assert 0.87 <= held / trials <= 1.0
    assert fit.high - fit.low < 0.3


def test_two_points_give_an_exponent_without_an_interval() -> None:
    fit = fit_power_law([1.0, 2.0], [8.0, 4.0])
    assert fit.exponent == pytest.approx(-1.0)
    assert fit.low is None
    assert fit.high is None


@pytest.mark.parametrize(
    ("x", "t"),
    [([1.0], [1.0]), ([2.0, 2.0], [1.0, 1.0]), ([1.0, 2.0], [0.0, 1.0]), ([-1, 2], [1, 1])],
)
def test_fit_refuses_what_has_no_exponent(x: list[float], t: list[float]) -> None:
    with pytest.raises(ValueError, match="power law"):
        fit_power_law(x, t)


# Sweeps


@pytest.mark.parametrize("largest", [1 << 16, 1 << 21, 1 << 24])
def test_sweeps_vary_what_they_say_and_keep_the_rest(largest: int) -> None:
    seen = set()
    for plan in plans(largest, threads=4):
        xs = [x for x, _ in plan.works]
        assert xs == sorted(set(xs))
        assert len(xs) >= 3
        works = [work for _, work in plan.works]
        assert max(work.elements for work in works) <= largest
        seen.add((plan.against, works[0].layer))
        if plan.against == "elements":
            assert [work.elements for work in works] == xs
        if plan.against == "groups":
            assert [work.elements // work.group_size for work in works] == xs
            assert {work.group_size for work in works} == {1024}
        if plan.against == "group size":
            assert [work.group_size for work in works] == xs
            assert len({work.elements for work in works}) == 1
        if plan.against == "threads":
            assert xs == [1, 2, 4]
            assert len(set(works)) == 1
    kinds = ("elements", "groups", "group size", "threads")
    assert seen == {(k, layer) for k in kinds for layer in ("BatchNormalNorm2d", "LayerNormalNorm")}


def test_plans_refuse_too_small_an_input() -> None:
    with pytest.raises(ValueError, match="at least 65536"):
        next(plans(1000))


def test_a_sweep_is_measured_and_kept(tmp_path: Path) -> None:
    plan = next(plan for plan in plans(1 << 16) if plan.against == "groups")
    small = Plan(plan.against, plan.kept, plan.works[:5])
    threads = torch.get_num_threads()
    sweeps = scaling.sweep(small, ("reference", "torch"), budget_s=0.2)
    assert torch.get_num_threads() == threads
    assert [s.provider for s in sweeps] == ["reference", "torch"]
    assert [p.x for p in sweeps[0].points] == [1, 2, 4, 8, 16]
    # The definition costs more than torch's layer at any size.
    for slow, fast in zip(sweeps[0].points, sweeps[1].points, strict=True):
        assert slow.median_ms > fast.median_ms > 0
    study = scaling.Scaling(environment=report_samples.CPU, sweeps=sweeps)
    scaling.save(study, tmp_path / "study.json")
    assert scaling.load(tmp_path / "study.json") == study


def test_a_sweep_over_threads_leaves_their_number_alone() -> None:
    plan = next(plan for plan in plans(1 << 16, threads=2) if plan.against == "threads")
    before = torch.get_num_threads()
    (sweep,) = scaling.sweep(plan, ("torch",), budget_s=0.05)
    assert torch.get_num_threads() == before
    assert sweep.fit.offset_ms == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"format": "normnorm-bench", "version": 1}',
        '{"format": "normnorm-scaling", "v',
        '{"format": "normnorm-scaling", "version": 2}',
        '{"format": "normnorm-scaling", "version": 1}',
    ],
)
def test_studies_that_are_none_give_a_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ResultsError, match=r"study\.json"):
        scaling.load(path)


# The model of several GPUs


def test_resnets_have_their_published_sizes() -> None:
    """torchvision's documentation: 25,557,032 and 11,689,512 parameters."""
    fifty, eighteen = model.resnet(50), model.resnet(18)
    assert (len(fifty.channels), fifty.parameters) == (53, 25_557_032)
    assert (len(eighteen.channels), eighteen.parameters) == (20, 11_689_512)
    assert fifty.elements[0] == 64 * 112 * 112
    assert fifty.elements[-1] == 2048 * 7 * 7
    with pytest.raises(ValueError, match="depth"):
        model.resnet(34)


@pytest.mark.parametrize("noise", [True, False])
def test_model_sends_what_the_layer_sends(
    noise: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every collective of a forward and backward pass, recorded in a group of one."""
    sent: list[model.Message] = []

    def recorded(kind, function, argument):
        def call(*arguments, **keywords):
            tensor = arguments[argument]
            sent.append(model.Message(kind, tensor.numel() * tensor.element_size()))
            return function(*arguments, **keywords)

        return call

    monkeypatch.setattr(dist, "all_reduce", recorded("all_reduce", dist.all_reduce, 0))
    monkeypatch.setattr(dist, "all_gather", recorded("all_gather", dist.all_gather, 1))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=(tmp_path / "rendezvous").as_uri(), rank=0, world_size=1
    )
    try:
        x = torch.randn(4, 6, 3, 3, requires_grad=True)
        noise_train = 0.4 if noise else 0.0
        sync_batch_normal_norm(x, None, None, None, noise_train=noise_train).sum().backward()
    finally:
        dist.destroy_process_group()
    layer = model.Network("a layer", (6,), (54,), 0)
    assert tuple(sent) == model.statistics_messages(layer, noise)


def test_gradients_are_sent_whole_in_torchs_buckets() -> None:
    messages = model.gradient_messages(model.resnet())
    sizes = [message.bytes for message in messages]
    assert sum(sizes) == 4 * 25_557_032
    assert sizes[0] == 1 << 20
    assert max(sizes) == 25 << 20


def test_model_adds_up_and_grows_with_the_gpus() -> None:
    before = 0.0
    for gpus in model.GPUS:
        plain = model.step_time(gpus, synchronised=False)
        noisy = model.step_time(gpus, synchronised=True)
        quiet = model.step_time(gpus, synchronised=True, noise=False)
        for time in (plain, noisy, quiet):
            assert time.total.low == pytest.approx(sum(part.low for part in time))
            assert all(0 <= part.low <= part.high for part in time)
        if gpus == 1:
            assert plain == noisy == quiet
            assert plain.total.low == pytest.approx(256 / 2470)
        else:
            assert plain.total.high < quiet.total.low < noisy.total.low
            assert noisy.statistics.high > 1.4 * quiet.statistics.high  # 265 messages to 159
        assert plain.total.low >= before
        before = plain.total.low
    for bad in (0, 9, 1000):
        with pytest.raises(ValueError, match="1 to 8"):
            model.step_time(bad, synchronised=True)


def test_model_is_near_the_published_step_on_eight_gpus() -> None:
    published = 8 * model.PARAMETERS["batch"].value / model.PARAMETERS["images_per_s_8"].value
    modelled = model.step_time(8, synchronised=False).total
    assert abs(modelled.high / published - 1) < 0.25


def test_every_parameter_has_a_source() -> None:
    for name, parameter in model.PARAMETERS.items():
        assert parameter.value > 0, name
        assert len(parameter.source) > 10, name
        assert parameter.meaning, name


# Messages between processes of this machine


@pytest.mark.parametrize("alpha", [1e-5, 3e-3])
def test_alpha_and_beta_are_found(alpha: float) -> None:
    sizes = [256, 4096, 65536, 1 << 20, 16 << 20]
    found = gloo.fit_alpha_beta({size: alpha + size * 4e-10 for size in sizes})
    assert found == pytest.approx((alpha, 4e-10), rel=1e-6)


def test_alpha_and_beta_are_never_negative() -> None:
    alpha, beta = gloo.fit_alpha_beta({1000: 1e-4, 2000: 1e-5, 4000: 1e-6})
    assert alpha >= 0
    assert beta >= 0


def test_check_refuses_what_cannot_be_sent() -> None:
    with pytest.raises(ValueError, match="at least 2 processes"):
        gloo.check(1, {})
    with pytest.raises(ValueError, match="multiples of 4"):
        gloo.check(2, {"odd": [model.Message("all_reduce", 7)]})


@pytest.mark.parametrize("processes", [2, 4])
def test_a_steps_messages_are_sent_and_their_time_predicted(processes: int) -> None:
    """How near the prediction comes is a measurement, which other work on the machine spoils:
    ``benchmarks/scaling.py`` stores it, and the report draws the model only where it held."""
    network = model.resnet(18)
    sequences = {
        "statistics": model.statistics_messages(network),
        "gradients": model.gradient_messages(network),
    }
    checks = gloo.check(processes, sequences, rounds=3)
    assert [check.what for check in checks] == list(sequences)
    for check, messages in zip(checks, sequences.values(), strict=True):
        assert check.processes == processes
        assert check.calls == len(messages)
        assert min(check.alpha_us, check.gb_per_s, check.predicted_ms, check.measured_ms) > 0
        assert check.wall_ms > 0
        assert check.error == pytest.approx(check.predicted_ms / check.measured_ms - 1)

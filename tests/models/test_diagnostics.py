"""The diagnostics: Q-Q statistics, moments, independence, sparsity, clusters, robustness."""

import copy

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torchvision.models import convnext

import normnorm
from normnorm import diagnostics, quantiles
from normnorm.diagnostics import statistics
from normnorm.diagnostics.accumulators import ColumnMoments, RowSample


@pytest.mark.parametrize("count", [2, 48])
def test_qq_r_squared_equals_probplot(count):
    groups = np.random.default_rng(count).gamma(2.0, size=(5, count))
    found = quantiles.qq_r_squared(torch.from_numpy(groups))
    for row, r2 in zip(groups, found, strict=True):
        (expected, _), (_, _, r) = scipy.stats.probplot(row)
        np.testing.assert_allclose(quantiles.normal_quantiles(count), expected, atol=1e-12)
        assert r2.item() == pytest.approx(r**2, abs=1e-12)
    assert quantiles.qq_r_squared(torch.full((1, count), 2.0)).isnan().all()


def test_normal_samples_have_the_documented_r_squared():
    assert quantiles.normal_r_squared(48) == pytest.approx(0.977, abs=1e-3)
    assert 0.999 < quantiles.normal_r_squared(7200) < 1


# Accumulators.


def test_moments_do_not_depend_on_the_batches():
    rows = torch.from_numpy(np.random.default_rng(1).gamma(0.5, size=(100, 3))) + 1000
    rows[:30, 0] = 0
    expected = rows.numpy()
    for sizes in ([100], [40, 0, 35, 25], [1] * 100):
        moments = ColumnMoments(3)
        for batch in rows.split(sizes):
            moments.add(batch)
        np.testing.assert_allclose(moments.mean, expected.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.variance, expected.var(0), rtol=1e-10)
        np.testing.assert_allclose(moments.skewness, scipy.stats.skew(expected), rtol=1e-8)
        np.testing.assert_allclose(moments.kurtosis, scipy.stats.kurtosis(expected), rtol=1e-8)
        np.testing.assert_allclose(moments.correlation, np.corrcoef(expected.T), atol=1e-12)
        assert moments.sparsity.tolist() == [0.3, 0, 0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.1, 3075.3])
def test_a_constant_column_with_rounded_deviations_is_left_out(value):
    sample = np.random.default_rng(0).standard_exponential((2048, 4)).astype(np.float32)
    varying = np.delete(sample, 1, axis=1)
    sample[:, 1] = value
    for found, expected in zip(
        statistics.shapiro_wilk(sample), statistics.shapiro_wilk(varying), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    assert statistics.joint_distance(sample, 8, 0) == statistics.joint_distance(varying, 8, 0)
    assert statistics.mutual_information(sample, 3, 0) == statistics.mutual_information(
        varying, 3, 0
    )
    assert quantiles.qq_r_squared(torch.from_numpy(sample.T)).isnan().tolist() == [
        False, True, False, False,
    ]  # fmt: skip
    for rows in (7, 300, 1000):
        moments = ColumnMoments(2)
        for part in torch.full((rows, 1), value, dtype=torch.float64).split(100):
            moments.add(torch.cat([part, torch.rand(len(part), 1, dtype=torch.float64)], 1))
        assert moments.constant.tolist() == [True, False]
        for numbers in (moments.skewness, moments.kurtosis, moments.correlation.diagonal()):
            assert numbers.isnan().tolist() == [True, False]


def test_a_channel_that_is_not_finite_makes_the_layer_nan_and_is_named():
    def spoil(module, arguments, output):
        output = output.clone()
        output[3, :2] = torch.tensor([np.nan, np.inf])
        return output

    x, labels = torch.randn(60, 4), torch.arange(60) % 2
    x[:, 3] = 0.1
    model = nn.Sequential(nn.Identity(), nn.Identity())
    model[1].register_forward_hook(spoil)
    sentence = "layer '1': channels 0, 1 of 4 hold NaN"
    with pytest.warns(RuntimeWarning, match=sentence) as caught:
        found = diagnostics.diagnose(model, [(x, labels)], ["0", "1"])
    assert len(caught) == 1
    clean, spoilt = found.layers["0"], found.layers["1"]
    numbers = ("skewness", "kurtosis", "qq_r2", "shapiro_w", "shapiro_passed", "joint_distance",
               "correlation", "mutual_information")  # fmt: skip
    for name in numbers:
        assert np.isfinite(getattr(clean, name)), name
        assert np.isnan(getattr(spoilt, name)), name
    assert all(np.isnan(number) for number in spoilt.clustering.values())
    assert np.isnan(spoilt.by_channel["skewness"]).tolist() == [True, True, False, True]
    assert (clean.constant_channels, clean.nonfinite_channels) == ([3], [])
    assert (spoilt.constant_channels, spoilt.nonfinite_channels) == ([3], [0, 1])
    assert found.table().splitlines()[-3:] == [
        "0: channel 3 of 4 constant", "1: channel 3 of 4 constant",
        "1: channels 0, 1 of 4 not finite",
    ]  # fmt: skip


def test_every_row_is_kept_with_equal_probability():
    stayed = torch.zeros(50)
    for seed in range(400):
        sample = RowSample(10, seed)
        for batch in torch.arange(50.0).unsqueeze(1).split([7, 1, 30, 12]):
            sample.add(batch, batch[:, 0].long())
        assert sample.rows.shape == (10, 1)
        assert torch.equal(sample.rows[:, 0].long(), sample.labels)
        assert sample.rows.unique().numel() == 10
        stayed[sample.labels] += 1
    # 400 draws of 10 of 50: 80 each, chi-square with 49 degrees of freedom.
    assert scipy.stats.chisquare(stayed.numpy()).pvalue > 1e-3


# Statistics.


def test_joint_distance_detects_nonnormal_pairs_of_normal_channels():
    random = np.random.default_rng(0)
    normal = random.standard_normal((2000, 2))
    # Each channel is normal, the pair is not: the second is the first with random signs.
    signs = random.choice([-1.0, 1.0], 2000)
    hidden = np.stack([normal[:, 0], signs * normal[:, 0]], 1)
    expected = statistics.normal_joint_distance(2000)
    assert statistics.joint_distance(normal, 32, 0) < 2 * expected
    assert statistics.joint_distance(hidden, 32, 0) > 5 * expected


def test_mutual_information_detects_dependence_without_correlation():
    values = np.random.default_rng(0).standard_normal((2000, 2))
    dependent = np.stack([values[:, 0], values[:, 0] ** 2], 1)
    assert abs(np.corrcoef(dependent.T)[0, 1]) < 0.1
    assert abs(statistics.mutual_information(values, 8, 0)) < 0.01
    assert statistics.mutual_information(dependent, 8, 0) > 0.3


def test_clustering_of_separate_and_of_shuffled_classes():
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 7], 40)
    vectors = random.standard_normal((120, 5)) + 10 * labels[:, None]
    apart = statistics.clustering(vectors, labels)
    mixed = statistics.clustering(vectors, random.permutation(labels))
    assert apart["nearest_centroid"] == 1
    assert apart["silhouette"] > 0.8
    assert apart["within_between"] < 0.2 < 1 < mixed["within_between"]
    assert mixed["nearest_centroid"] < 0.5
    assert statistics.clustering(vectors[:40], labels[:40]) is None
    equal = statistics.clustering(np.full((20, 3), 0.1), np.arange(20) % 2)
    assert all(np.isnan(number) for number in equal.values())


# Layers of a model.


def _network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), normnorm.BatchNormalNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 36, 8), nn.LayerNorm(8), nn.Linear(8, 3),
    )  # fmt: skip


def _loader(count=4):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20) % 3
    return [
        (torch.randn(20, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1), labels)
        for _ in range(count)
    ]


def test_diagnose_equals_statistics_of_captured_outputs():
    network, loader = _network(), _loader()
    found = diagnostics.diagnose(network, loader, ["1", "2", "5"], sample_size=10**6)
    outputs: list[torch.Tensor] = []
    network[2].register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
    network.eval()
    with torch.no_grad():
        for inputs, _ in loader:
            network(inputs)
    rows = torch.cat(outputs).movedim(1, -1).flatten(0, -2).double().numpy()
    relu = found.layers["2"]
    assert relu.observations == len(rows) == 4 * 20 * 36
    assert relu.skewness == pytest.approx(np.abs(scipy.stats.skew(rows)).mean())
    assert relu.kurtosis == pytest.approx(scipy.stats.kurtosis(rows).mean())
    assert relu.sparsity == pytest.approx((rows == 0).mean())
    assert 0.2 < relu.sparsity < 0.8
    expected = [scipy.stats.probplot(column)[1][2] ** 2 for column in rows.T]
    assert relu.by_channel["qq_r2"] == pytest.approx(expected, abs=1e-6)
    assert found.layers["1"].layer == "BatchNormalNorm2d"
    assert found.layers["5"].channels == 8
    assert found.layers["5"].observations == 80


@pytest.mark.parametrize(
    ("layer", "shape", "groups"),
    [
        (nn.BatchNorm2d(6), (4, 6, 5, 5), lambda x: x.transpose(0, 1).flatten(1)),
        (normnorm.BatchNormalNormAct2d(6), (4, 6, 5, 5), lambda x: x.transpose(0, 1).flatten(1)),
        (nn.LayerNorm(6), (4, 9, 6), lambda x: x.flatten(0, 1)),
        (normnorm.LayerNormalNorm((9, 6)), (4, 9, 6), lambda x: x.flatten(1)),
        (convnext.LayerNorm2d(6), (4, 6, 5, 5), lambda x: x.movedim(1, -1).flatten(0, 2)),
        (nn.GroupNorm(2, 6), (4, 6, 5, 5), lambda x: x.reshape(8, 75)),
        (normnorm.GroupNormalNorm(2, 6), (4, 6, 5, 5), lambda x: x.reshape(8, 75)),
        (nn.InstanceNorm2d(6, affine=True), (4, 6, 5, 5), lambda x: x.reshape(24, 25)),
        (normnorm.InstanceNormalNorm2d(6, affine=True), (4, 6, 5, 5), lambda x: x.reshape(24, 25)),
        (nn.BatchNorm1d(6, track_running_stats=False), (9, 6), lambda x: x.T),
        (normnorm.InstanceNormalNorm2d(6, track_running_stats=True), (4, 6, 5, 5),
         lambda x: x.transpose(0, 1).flatten(1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)  # fmt: skip
def test_own_groups_are_measured_before_the_affine_map(layer, shape, groups):
    torch.manual_seed(0)
    inputs = [torch.empty(shape).exponential_() for _ in range(3)]
    layer = copy.deepcopy(layer)
    layer(inputs[0])  # for running statistics other than 0 and 1
    bare = copy.deepcopy(layer).eval()
    if isinstance(bare, normnorm.BatchNormalNormAct2d):
        bare.act = nn.Identity()
    with torch.no_grad():
        expected = [groups(bare(x)) for x in inputs]
    # In evaluation running statistics normalize a channel of all batches alike.
    by_channel = getattr(layer, "running_mean", None) is not None
    expected = torch.cat(expected, dim=1 if by_channel else 0).double().numpy()
    for name, parameter in layer.named_parameters():
        # One channel is constant behind the affine map.
        nn.init.uniform_(parameter, -2, 2).data.flatten()[2] = 0.0 if name == "weight" else 1.0
    found = diagnostics.diagnose(layer, inputs, channels=1000).layers[""].own_groups
    assert found["skewness"] == pytest.approx(np.abs(scipy.stats.skew(expected, 1)).mean(), 1e-4)
    assert found["kurtosis"] == pytest.approx(scipy.stats.kurtosis(expected, 1).mean(), 1e-4, 1e-4)
    r2 = np.mean([scipy.stats.probplot(row)[1][2] ** 2 for row in expected])
    assert found["qq_r2"] == pytest.approx(r2, abs=1e-5)
    assert found["normal_qq_r2"] == pytest.approx(quantiles.normal_r_squared(expected.shape[1]))
    assert (found["groups"], found["constant"], found["nonfinite"]) == (len(expected), 0, 0)


def test_constant_and_nonfinite_groups_are_counted():
    batches = [torch.randn(5, 4), torch.randn(3, 4)]
    batches[0][1] = 7.3
    layer = nn.LayerNorm(4)
    found = diagnostics.diagnose(layer, batches)
    own = found.layers[""].own_groups
    assert (own["groups"], own["constant"], own["nonfinite"]) == (8, 1, 0)
    assert np.isfinite(own["qq_r2"])
    assert found.table().splitlines()[-1] == ": 1 of 8 groups constant"
    batches[1][2, 0] = np.nan
    with pytest.warns(RuntimeWarning, match="channels 0, 1, 2, 3 of 4 hold NaN"):
        own = diagnostics.diagnose(layer, batches).layers[""].own_groups
    assert (own["constant"], own["nonfinite"]) == (1, 1)
    assert np.isnan(own["qq_r2"])
    (other,) = diagnostics.diagnose(nn.Sequential(nn.ReLU()), batches[:1], "0").layers.values()
    assert other.own_groups is None


def test_the_normalized_output_of_a_residual_stream_is_watched_and_disturbed():
    class Stream(nn.ModuleDict):
        def forward(self, x):
            normed, total = self["norm"](x, x)
            return normed + 0 * total

    model, inputs = Stream({"norm": normnorm.AddLayerNormalNorm(4)}), torch.randn(9, 5, 4)
    found = diagnostics.diagnose(model, [inputs]).layers["norm"]
    assert (found.channels, found.observations) == (4, 45)
    assert found.own_groups["groups"] == 45
    change = diagnostics.noise_robustness(model, [inputs], scales=(0.5,))
    assert change["norm"][0.5] == pytest.approx(0.5, rel=0.2)


def test_an_input_by_another_name_is_measured():
    class Named(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x)

    class Model(nn.ModuleDict):
        def forward(self, x):
            return self["norm"](x=x)

    found = diagnostics.diagnose(Model({"norm": Named(4)}), [torch.randn(9, 4)])
    assert found.layers["norm"].own_groups["groups"] == 9


def test_normalization_layers_are_watched_by_default_and_the_model_is_left_alone():
    network = _network()
    network[1].eval()
    before = copy.deepcopy(network.state_dict())
    found = diagnostics.diagnose(network, _loader())
    assert list(found.layers) == ["1", "5"]
    assert [module.training for module in (network, network[1], network[5])] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not network[1]._forward_hooks
    assert found == diagnostics.diagnose(network, _loader())


def test_memory_is_bounded_by_the_sample_and_the_channels():
    network = nn.Sequential(nn.Identity())
    numbers = 100.0 * torch.arange(30).view(30, 1, 1)
    batches = [torch.randn(64, 30, 9, 9) + numbers for _ in range(5)]
    found = diagnostics.diagnose(network, batches, ["0"], sample_size=100, channels=7)
    layer = found.layers["0"]
    assert layer.sample.shape == (100, 7)
    assert (layer.channels, layer.watched_channels, layer.observations) == (30, 7, 64 * 81 * 5)
    assert layer.by_channel["channel"] == (layer.sample / 100).mean(0).round().tolist()


def test_a_layer_of_zeros_is_dead_with_nan_statistics():
    found = diagnostics.diagnose(nn.Sequential(nn.ReLU()), [-torch.rand(9, 4)], ["0"]).layers["0"]
    assert (found.sparsity, found.dead_channels) == (1, 1)
    assert np.isnan([found.qq_r2, found.skewness, found.correlation, found.joint_distance]).all()


def test_a_diagnosis_is_saved_read_shown_and_drawn(tmp_path):
    found = diagnostics.diagnose(_network(), _loader(), batches=2)
    path = tmp_path / "diagnosis.json"
    found.save(path)
    read = diagnostics.Diagnosis.load(path)
    assert read == found
    assert read.table() == found.table()
    assert len(found.table().splitlines()) == 4
    files = found.plot(tmp_path / "plots")
    assert [file.name for file in files] == [
        "profile.png", "qq_1.png", "hist_1.png", "qq_5.png", "hist_5.png",
    ]  # fmt: skip
    assert all(matplotlib.image.imread(file).std() > 0.05 for file in files)
    assert [file.name for file in read.plot(tmp_path / "again")] == ["profile.png"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format": "other", "layers": {}}',
     '{"format": "normnorm diagnosis 2", "layers": {"a": {}}}'],
)  # fmt: skip
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a saved diagnosis"):
        diagnostics.Diagnosis.load(path)


# Noise.


def test_robustness_of_a_linear_model_is_known():
    # The noise passes unchanged, so that the relative change equals the scale.
    network = nn.Sequential(nn.Identity(), nn.Identity())
    inputs = torch.randn(2000, 50)
    found = diagnostics.noise_robustness(network, [inputs, inputs], ["1"], scales=(0.0, 0.1, 1.0))
    assert found["1"] == pytest.approx({0.0: 0.0, 0.1: 0.1, 1.0: 1.0}, rel=0.02)


def test_robustness_disturbs_one_layer_at_a_time():
    network = _network()
    both = diagnostics.noise_robustness(network, _loader(), scales=(0.5,))
    assert list(both) == ["1", "5"]
    assert both["5"] == diagnostics.noise_robustness(network, _loader(), ["5"], scales=(0.5,))["5"]


def test_compiled_models_are_diagnosed_uncompiled():
    torch.compiler.reset()
    network, loader = _network().eval(), _loader()
    expected = diagnostics.diagnose(network, loader)
    moved = diagnostics.noise_robustness(network, loader, scales=(0.5,))
    model = torch.compile(network, backend="eager")
    with torch.no_grad():
        model(loader[0][0])  # compiled before the hooks
    assert diagnostics.diagnose(model, loader) == expected
    assert diagnostics.noise_robustness(model, loader, scales=(0.5,)) == moved
    torch.compiler.reset()


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"layers": []}, ValueError, "nothing to watch"),
        ({"layers": lambda name, module: False}, ValueError, "predicate"),
        ({"loader": []}, ValueError, "the loader gave no batch"),
        ({"loader": [{"image": 1}]}, TypeError, "a batch must be a tensor"),
        ({"model": nn.Sequential(nn.Linear(64, 2))}, ValueError, "a normalization layer was"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", [diagnostics.diagnose, diagnostics.noise_robustness])
def test_bad_input_is_refused(function, arguments, error, sentence):
    network = _network()
    with pytest.raises(error, match=sentence):
        function(**{"model": network, "loader": _loader(), **arguments})
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


def test_invalid_sizes_and_scales_raise():
    for argument in ("sample_size", "channels", "projections", "batches"):
        with pytest.raises(ValueError, match=f"{argument} must be positive; got 0"):
            diagnostics.diagnose(_network(), _loader(), **{argument: 0})
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scales must be finite"):
            diagnostics.noise_robustness(_network(), _loader(), scales=(scale,))


def test_layers_that_give_no_tensor_or_never_run_are_refused():
    class Model(nn.ModuleDict):
        def forward(self, x):
            return self["lstm"](x)[0]

    model = Model({"lstm": nn.LSTM(2, 2), "unused": nn.ReLU()})
    with pytest.raises(TypeError, match=r"'lstm' \(LSTM\) gave tuple"):
        diagnostics.diagnose(model, [torch.randn(3, 2)], ["lstm"])
    for function in (diagnostics.diagnose, diagnostics.noise_robustness):
        with pytest.raises(ValueError, match="nothing passed through 'unused'"):
            function(model, [torch.randn(3, 2)], ["unused"])

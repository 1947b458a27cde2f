"""Derivatives: first, second and third, reverse and forward, and under every torch.func transform.

Numerical differences are the first judge (gradcheck and its kin), plain automatic differentiation
of the definition the second. Noise carries no gradient by definition, so that with noise on the
function is compared with the one in which noise and noise scale are given constants.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from layer_table import KINDS, LAYERS, NAMES, RUNNING, few
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close

import normnorm
import normnorm.functional as F
from normnorm import reference
from normnorm.autograd import normal_norm
from normnorm.config import Config
from normnorm.statistics import Row

each_kind = pytest.mark.parametrize("row", KINDS, ids=lambda row: row.kind)
# Relative to values of order one in float64, after a few dozen roundings.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def frozen_statistics(row):
    """Running statistics that differ from channel to channel, lambda on either side of 1."""
    ramp = torch.linspace(0.0, 1.0, row.shape[1], dtype=torch.float64)
    return 0.3 * ramp - 0.1, 0.5 + ramp, 0.4 + 1.3 * ramp


def function_of(row, frozen=False, noise=0.0, **settings):
    """The layer as a function of (input, weight, bias), by its functional form."""
    settings = {"noise_train": noise, **settings}

    def function(input, weight=None, bias=None):
        if row.kind == "batch":
            running = frozen_statistics(row) if frozen else (None, None, None)
            return F.batch_normal_norm(input, *running, weight, bias, not frozen, **settings)
        if row.kind == "layer":
            shape = row.parameter_shape
            return F.layer_normal_norm(input, shape, weight, bias, training=True, **settings)
        if row.kind == "group":
            return F.group_normal_norm(
                input, row.num_groups, weight, bias, training=True, **settings
            )
        return F.instance_normal_norm(input, weight=weight, bias=bias, training=True, **settings)

    return function


def definition_of(row, **settings):
    """The same function, by the definition alone."""
    kind, num_groups, normalized_ndim = row.geometry

    def function(input, weight=None, bias=None):
        return reference.normal_norm(
            input, weight, bias, kind=kind, num_groups=num_groups,
            normalized_ndim=normalized_ndim, **settings,
        )[0]  # fmt: skip

    return function


def leaves(row, requires=(True, True, True)):
    """Float64 (input, weight, bias); None where ``requires`` says None."""
    layer = row.make(dtype=torch.float64)
    tensors = (row.input(), layer.weight.detach(), layer.bias.detach())
    return tuple(
        None if required is None else tensor.clone().requires_grad_(required)
        for tensor, required in zip(tensors, requires, strict=True)
    )


# Against numerical differences


SETTINGS = {
    "default": {},
    "gradient step": {"order": 1},
    "half step": {"alpha": 0.5},
    "no step": {"alpha": 0.0},
    "long step": {"alpha": 1.7, "order": 1},
    "shifted exponent": {"transform_eps": 1e-5**0.5},
    "large eps": {"eps": 0.1},
}
FAST_SETTINGS = ("default", "gradient step")
each_setting = pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            settings,
            id=name.replace(" ", "-"),
            marks=() if name in FAST_SETTINGS else pytest.mark.slow,
        )
        for name, settings in SETTINGS.items()
    ],
)


@each_kind
@each_setting
def test_first_derivatives_pass_gradcheck_in_reverse_and_forward_mode(row, settings, backend):
    function = function_of(row, **settings)
    assert gradcheck(
        function, leaves(row), fast_mode=True, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip


@each_kind
@each_setting
def test_second_derivatives_pass_gradgradcheck(row, settings, backend):
    function = function_of(row, **settings)
    assert gradgradcheck(
        function, leaves(row), fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True
    )


@pytest.mark.parametrize("row", few(KINDS, KINDS[1:]))
def test_every_single_entry_of_the_jacobian_is_right(row, backend):
    assert gradcheck(function_of(row), leaves(row))


@pytest.mark.slow
@pytest.mark.parametrize("row", LAYERS, ids=NAMES)
@each_setting
def test_every_entry_of_first_and_second_derivatives_is_right(row, settings, backend):
    function = function_of(row, **settings)
    assert gradcheck(function, leaves(row), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves(row), check_fwd_over_rev=True, check_batched_grad=True)


REQUIRED = [
    requires
    for requires in itertools.product((True, False, None), repeat=3)
    if requires[0] is not None and True in requires
]


FEW = [(True, True, True), (True, False, True), (False, True, None), (True, None, None)]


@pytest.mark.parametrize("row", few(KINDS, KINDS[:2]))
@pytest.mark.parametrize(
    "requires",
    [
        pytest.param(requires, id=str(requires), marks=() if requires in FEW else pytest.mark.slow)
        for requires in REQUIRED
    ],
)
def test_any_part_of_the_arguments_may_require_gradients_or_be_absent(row, requires, backend):
    assert gradcheck(function_of(row), leaves(row, requires), fast_mode=True)
    assert gradgradcheck(
        function_of(row), leaves(row, requires), fast_mode=True, check_fwd_over_rev=True
    )
    tensors = leaves(row, requires)
    function_of(row)(*tensors).square().sum().backward()
    for tensor, required in zip(tensors, requires, strict=True):
        assert tensor is None or (tensor.grad is not None) == required


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"transform_eps": 1e-5**0.5}, marks=pytest.mark.slow)],
    ids=["exact", "shifted"],
)
@pytest.mark.parametrize("requires", [(True, True, True), (False, True, None), (True, None, None)])
def test_frozen_batch_layers_pass_gradcheck_and_gradgradcheck(settings, requires, backend):
    row = KINDS[0]
    function = function_of(row, frozen=True, **settings)
    arguments = leaves(row, requires)
    assert gradcheck(
        function, arguments, fast_mode=True, check_forward_ad=True, check_batched_grad=True
    )
    assert gradgradcheck(function, arguments, fast_mode=True, check_fwd_over_rev=True)


@each_kind
@pytest.mark.parametrize(
    "layout",
    [
        "channels_last",
        "permuted",
        pytest.param("sliced", marks=pytest.mark.slow),
        pytest.param("expanded", marks=pytest.mark.slow),
    ],
)
def test_derivatives_are_right_whatever_the_strides(row, layout, backend):
    input, weight, bias = leaves(row)
    arrange = {
        "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
        "sliced": lambda x: torch.stack([x, -x], -1)[..., 0],
        "permuted": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
        "expanded": lambda x: x[:1].expand(x.shape) if row.kind != "batch" else x[..., :1].expand(
            x.shape),
    }[layout]  # fmt: skip

    def function(x, weight, bias):
        return function_of(row)(arrange(x), weight, bias)

    assert gradcheck(function, (input, weight, bias), fast_mode=True, check_batched_grad=True)
    assert gradgradcheck(function, (input, weight, bias), fast_mode=True)
    # The upstream gradient comes in any strides as well.
    output = function_of(row)(input, weight, bias)
    upstream = torch.randn_like(output)
    plain = torch.autograd.grad(output, (input, weight, bias), upstream, retain_graph=True)
    strange = torch.autograd.grad(
        output, (input, weight, bias), arrange(upstream), retain_graph=True
    )
    if layout != "expanded":
        assert_close(strange, plain, **CLOSE)
    (from_sum,) = torch.autograd.grad(output.sum(), bias)  # expanded, stride 0
    assert_close(from_sum, torch.full_like(bias, output.numel() / bias.numel()))


def configured(row, noise, backend):
    kind, num_groups, normalized_ndim = row.geometry
    return Config(
        kind, num_groups, normalized_ndim, 1e-5, noise, 1.0, 2, 0.0, 0, False, "", backend
    )


@each_kind
@pytest.mark.parametrize("seed", [7, -(2**62)])
def test_with_noise_and_its_scale_held_constant_gradcheck_passes(row, seed, backend):
    scale = torch.linspace(0.2, 1.1, row.groups, dtype=torch.float64)

    def function(input, weight, bias):
        return normal_norm(
            (input, None, None, None, weight, bias, None, torch.tensor([seed]), scale), False,
            False, configured(row, 0.7, backend),
        )[0]  # fmt: skip

    arguments = leaves(row)
    assert gradcheck(function, arguments, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, arguments, fast_mode=True)
    definition = definition_of(row, noise_train=0.7, seed=torch.tensor([seed]), noise_scale=scale)
    assert_close(function(*arguments), definition(*arguments), **CLOSE)


@each_kind
def test_gradients_with_noise_are_those_of_the_definition(row, backend):
    function = function_of(row, noise=0.6, seed=11)
    definition = definition_of(row, noise_train=0.6, seed=torch.tensor([11]))
    results = []
    for one in (function, definition):
        arguments = leaves(row)
        output = one(*arguments)
        first = torch.autograd.grad(output.sin().sum(), arguments, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), arguments)
        results.append((output, first, second))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    # The scale is constant by definition: the gradient is not that of the map as computed.
    with pytest.raises(RuntimeError):
        gradcheck(function, leaves(row), fast_mode=True)


@each_kind
def test_third_derivatives_are_those_of_the_definition(row, backend):
    results = []
    for function in (function_of(row), definition_of(row)):
        arguments = leaves(row)
        value = function(*arguments).sin().sum()
        found = []
        for order in range(3):
            gradients = torch.autograd.grad(value, arguments, create_graph=order < 2)
            found.append(gradients)
            value = sum(g.cos().sum() for g in gradients)
        results.append(found)
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("row", few(KINDS, KINDS[1:2]))
def test_third_derivatives_pass_gradgradcheck_of_the_gradient(row, backend):
    function = function_of(row)

    def gradient(input):
        return torch.autograd.grad(function(input).sin().sum(), input, create_graph=True)[0]

    assert gradgradcheck(gradient, leaves(row)[:1], fast_mode=True)


class Defined(nn.Module):
    """A layer that computes by the definition, with the parameters of one of ours."""

    def __init__(self, row, layer):
        super().__init__()
        self.weight, self.bias, self.function = layer.weight, layer.bias, definition_of(row)

    def forward(self, input):
        return self.function(input, self.weight, self.bias)


@pytest.mark.parametrize("row", few(LAYERS, KINDS))
def test_gradient_penalty_trains_a_critic_as_the_definition_does(row, backend):
    results = []
    layers = [row.make(noise_train=0.0, dtype=torch.float64) for _ in range(2)]
    for first, second in (layers, [Defined(row, layer) for layer in layers]):
        critic = nn.Sequential(first, nn.Tanh(), second, nn.Flatten())
        input = row.input().requires_grad_()
        score = critic(input).square().mean()
        (gradient,) = torch.autograd.grad(score, input, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1.0).square().mean()
        parameters = [p for layer in (first, second) for p in (layer.weight, layer.bias)]
        results.append(torch.autograd.grad(score + 10.0 * penalty, [input, *parameters]))
    assert_close(results[0], results[1], rtol=1e-8, atol=1e-8)
    assert all(gradient.abs().max() > 0 for gradient in results[0][:3])


# The graph's habits


@each_kind
def test_statistics_carry_no_gradient(row, backend):
    arguments = leaves(row)
    tensors = (arguments[0], None, None, None, *arguments[1:], None, None, None)
    output, statistics, _ = normal_norm(tensors, False, True, configured(row, 0.0, backend))
    assert output.requires_grad
    assert not statistics.requires_grad
    assert statistics.shape == (len(Row), row.groups)


@each_kind
def test_nothing_is_recorded_where_no_gradient_is_wanted(row, backend):
    input, weight, bias = leaves(row)
    function = function_of(row)
    assert not function(input.detach(), weight.detach(), bias.detach()).requires_grad
    with torch.no_grad():
        assert not function(input, weight, bias).requires_grad
    with torch.inference_mode():
        assert not function(input, weight, bias).requires_grad
    assert function(input.detach(), weight, bias.detach()).requires_grad


@each_kind
def test_a_retained_graph_gives_the_same_gradients_again(row, backend):
    arguments = leaves(row)
    output = function_of(row, noise=0.4)(*arguments)
    loss = output.sin().sum()
    first = torch.autograd.grad(loss, arguments, retain_graph=True)
    second = torch.autograd.grad(loss, arguments)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, arguments)


@each_kind
@pytest.mark.parametrize("changed", [0, 1], ids=["input", "weight"])
def test_saved_tensors_changed_in_place_are_noticed(row, changed, backend):
    arguments = [tensor * 1.0 for tensor in leaves(row)]
    output = function_of(row)(*arguments)
    with torch.no_grad():
        arguments[changed].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@each_kind
def test_the_output_may_be_changed_in_place(row, backend):
    input, weight, bias = leaves(row)
    changed = function_of(row)(input, weight, bias).mul_(2.0).relu_()
    gradients = torch.autograd.grad(changed.sum(), (input, weight, bias))
    plain = torch.relu(2.0 * function_of(row)(input, weight, bias))
    assert_close(gradients, torch.autograd.grad(plain.sum(), (input, weight, bias)))


class Packed:
    """Saved tensors by way of a hook that keeps copies with other strides."""

    def __init__(self):
        self.tensors = []

    def pack(self, tensor):
        self.tensors.append(tensor)
        return tensor.dtype, tensor.detach().clone(memory_format=torch.contiguous_format)

    def unpack(self, packed):
        return packed[1]

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)


@each_kind
@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize("affine", [True, False])
def test_kept_for_backward_are_input_statistics_parameters_and_seed(row, noise, affine, backend):
    input, weight, bias = leaves(row, (True, True, True) if affine else (True, None, None))
    packed = Packed()
    with packed.hooks():
        function_of(row, noise=noise)(input, weight, bias)
    allowed = [tuple(input.shape), (len(Row), row.groups)]
    allowed += [row.parameter_shape] * 2 if affine else []
    allowed += [(1,)] if noise else []
    kept = [tuple(tensor.shape) for tensor in packed.tensors]
    for shape in kept:
        assert shape in allowed, f"{shape} was saved; allowed: {allowed}"
        allowed.remove(shape)
    inputs = [t for t in packed.tensors if t.shape == input.shape and t.numel() == input.numel()]
    assert any(t.data_ptr() == input.data_ptr() for t in inputs)  # itself, no copy


@pytest.mark.parametrize("row", LAYERS, ids=NAMES)
def test_layers_keep_no_more_bytes_than_that(row, backend):
    layer = row.make()
    input = row.input(torch.bfloat16).requires_grad_()
    packed = Packed()
    with packed.hooks():
        layer(input)
    storages = {t.untyped_storage().data_ptr(): t.nbytes for t in packed.tensors}
    statistics = len(Row) * row.groups * 4
    parameters = layer.weight.nbytes + layer.bias.nbytes
    assert sum(storages.values()) <= input.nbytes + statistics + parameters + 8


@pytest.mark.parametrize("row", LAYERS, ids=NAMES)
def test_gradients_do_not_depend_on_the_strides_the_saved_input_returns_with(row, backend):
    layer = row.make(dtype=torch.float64)
    input = row.input().movedim(1, -1).contiguous().movedim(-1, 1)
    results = []
    for hooks in (None, Packed().hooks(), torch.autograd.graph.save_on_cpu()):
        torch.manual_seed(2)
        x = input.clone().requires_grad_()
        assert x.stride() == input.stride()
        if hooks is None:
            loss = layer(x).sin().sum()
        else:
            with hooks:
                loss = layer(x).sin().sum()
        results.append(torch.autograd.grad(loss, (x, layer.weight, layer.bias)))
    assert_close(results[1], results[0], **CLOSE)
    assert_close(results[2], results[0], **CLOSE)


@pytest.mark.parametrize("row", few(LAYERS, KINDS))
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing_gives_the_same_gradients_with_noise(row, reentrant, backend):
    layer = row.make(dtype=torch.float64)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(4)
        input = row.input().requires_grad_()
        if checkpointed:
            output = torch.utils.checkpoint.checkpoint(layer, input, use_reentrant=reentrant)
        else:
            output = layer(input)
        loss = output.sin().sum()
        layer.zero_grad()
        loss.backward()
        results.append((output.detach(), input.grad, layer.weight.grad, layer.bias.grad))
    assert_close(results[1], results[0], **CLOSE)


@each_kind
def test_hooks_on_tensors_and_modules_fire(row, backend):
    layer = row.make(dtype=torch.float64)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer.weight.register_post_accumulate_grad_hook(lambda _: seen.append("weight"))
    input = row.input().requires_grad_()
    output = layer(input)
    output.register_hook(lambda g: 2.0 * g)
    output.sin().sum().backward()
    assert sorted(seen) == ["backward", "forward", "weight"]
    assert input.grad.abs().max() > 0


@each_kind
def test_frozen_gradient_survives_a_later_change_of_the_running_statistics(row, backend):
    if row.kind not in ("batch", "instance"):
        return
    layer = row.make(dtype=torch.float64, track_running_stats=True)
    layer(row.input())
    layer.eval()
    input = row.input(seed=1).requires_grad_()
    expected = torch.autograd.grad(layer(input).sin().sum(), input)
    loss = layer(input).sin().sum()
    layer.train()(row.input(seed=2))
    assert_close(torch.autograd.grad(loss, input), expected)


# torch.func


def scalar(function):
    return lambda *arguments: function(*arguments).sin().sum()


@each_kind
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_func_grad_and_vjp_equal_autograd(row, noise, backend):
    function = scalar(function_of(row, noise=noise, seed=5))
    arguments = leaves(row)
    expected = torch.autograd.grad(function(*arguments), arguments)
    constants = [tensor.detach() for tensor in arguments]
    found = torch.func.grad(function, argnums=(0, 1, 2))(*constants)
    assert_close(found, expected, **CLOSE)
    value, pull_back = torch.func.vjp(function, *constants)
    assert_close(pull_back(torch.ones_like(value)), expected, **CLOSE)
    assert all(gradient.abs().max() > 0 for gradient in found)


@each_kind
@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_func_jvp_and_dual_numbers_equal_the_definition(row, noise, moving, backend):
    function = function_of(row, noise=noise, seed=5)
    definition = definition_of(row, noise_train=noise, seed=torch.tensor([5]))
    constants = [tensor.detach() for tensor in leaves(row)]
    directions = [torch.randn_like(constants[i]) for i in moving]

    def of_moving(one):
        def inner(*moved):
            arguments = list(constants)
            for i, tensor in zip(moving, moved, strict=True):
                arguments[i] = tensor
            return one(*arguments)

        return inner

    points = tuple(constants[i] for i in moving)
    expected = torch.autograd.functional.jvp(of_moving(definition), points, tuple(directions))
    found = torch.func.jvp(of_moving(function), points, tuple(directions))
    assert_close(found[0], expected[0], **CLOSE)
    assert_close(found[1], expected[1], **CLOSE)
    assert found[1].abs().max() > 1e-3
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, d) for p, d in zip(points, directions, strict=True)]
        output = forward_ad.unpack_dual(of_moving(function)(*duals))
        assert_close(output.tangent, expected[1], **CLOSE)


def small(row):
    """An input with few elements, for whole Jacobians."""
    input = row.input()
    return input[:, :, :2, :2] if input.dim() == 4 else input


@each_kind
def test_jacobians_forward_and_reverse_equal_those_of_the_definition(row, backend):
    input = small(row)
    expected = torch.autograd.functional.jacobian(definition_of(row), input)
    assert_close(torch.func.jacrev(function_of(row))(input), expected, **CLOSE)
    assert_close(torch.func.jacfwd(function_of(row))(input), expected, **CLOSE)


@each_kind
@pytest.mark.parametrize(
    "names",
    list(itertools.product(("jacfwd", "jacrev"), repeat=2)),
    ids=lambda names: "-of-".join(names),
)
def test_hessians_by_every_nesting_equal_that_of_the_definition(row, names, backend):
    input = small(row)
    function = scalar(function_of(row))
    expected = torch.autograd.functional.hessian(scalar(definition_of(row)), input)
    outer, inner = (getattr(torch.func, name) for name in names)
    assert_close(outer(inner(function))(input), expected, rtol=1e-8, atol=1e-8)


@each_kind
def test_nested_forward_derivatives_are_never_a_silent_zero(row, backend):
    input = row.input()
    along, across = torch.randn_like(input), torch.randn_like(input)

    def second(one):
        return torch.func.jvp(
            lambda x: torch.func.jvp(one, (x,), (along,))[1], (input,), (across,)
        )[1]

    assert_close(second(function_of(row)), second(definition_of(row)), rtol=1e-8, atol=1e-8)


@each_kind
@pytest.mark.parametrize("batched", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("in_dim", [0, 1, pytest.param(-1, marks=pytest.mark.slow)])
def test_vmap_equals_a_loop_whatever_is_batched(row, batched, in_dim, backend):
    constants = [tensor.detach() for tensor in leaves(row)]
    arguments, in_dims = list(constants), [None] * 3
    for i in batched:
        copies = [constants[i] * (1.0 + 0.3 * n) + 0.1 * n for n in range(3)]
        dim = in_dim if in_dim < constants[i].dim() + 1 else 0
        arguments[i], in_dims[i] = torch.stack(copies, dim), dim
    function = function_of(row)
    found = torch.vmap(function, tuple(in_dims))(*arguments)
    expected = torch.stack([
        function(*(
            tensor if dim is None else tensor.select(dim, n)
            for tensor, dim in zip(arguments, in_dims, strict=True)
        ))
        for n in range(3)
    ])  # fmt: skip
    assert_close(found, expected, **CLOSE)


@each_kind
@pytest.mark.parametrize("layout", ["channels_last", "permuted"])
def test_vmap_over_parameters_takes_an_input_in_any_strides(row, layout, backend):
    input, weight, bias = (tensor.detach() for tensor in leaves(row))
    weights = torch.stack([weight, 2.0 * weight])
    moved = {"channels_last": (1, -1), "permuted": (0, -1)}[layout]
    strange = input.movedim(*moved).contiguous().movedim(*moved[::-1])
    found = torch.vmap(function_of(row), (None, 0, None))(strange, weights, bias)
    expected = torch.stack([function_of(row)(input, w, bias) for w in weights])
    assert_close(found, expected, **CLOSE)


@each_kind
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_per_sample_gradients_equal_a_loop(row, noise, backend):
    layer = row.make(dtype=torch.float64, noise_train=noise)
    if row.kind == "batch":
        layer.eval()  # frozen: one sample alone has the others' statistics
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    buffers = dict(layer.named_buffers())

    def loss(parameters, sample):
        return torch.func.functional_call(layer, (parameters, buffers), (sample[None],)).sin().sum()

    inputs = row.input()
    if noise and layer.training:
        with pytest.raises(RuntimeError, match="randomness"):
            torch.vmap(torch.func.grad(loss), (None, 0))(parameters, inputs)
        per_sample = torch.vmap(torch.func.grad(loss), (None, 0), randomness="different")
        found = per_sample(parameters, inputs)
        for name, gradients in found.items():
            assert gradients.shape == (len(inputs), *parameters[name].shape)
            assert gradients.isfinite().all()
        return
    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, inputs)
    singles = [torch.func.grad(loss)(parameters, sample) for sample in inputs]
    for name, gradients in found.items():
        assert_close(gradients, torch.stack([single[name] for single in singles]), **CLOSE)
        assert gradients.abs().max() > 0


@each_kind
def test_vmap_without_a_word_on_randomness_refuses_to_draw_noise(row, backend):
    inputs = torch.stack([row.input()] * 3)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(function_of(row, noise=0.4))(inputs)


@each_kind
@pytest.mark.parametrize("differentiated", [False, True], ids=["values", "gradients"])
def test_vmap_noise_is_the_same_or_different_as_asked(row, differentiated, backend):
    inputs = torch.stack([row.input()] * 3)
    function = function_of(row, noise=0.4)
    if differentiated:
        function = torch.func.grad(scalar(function))
    same = torch.vmap(function, randomness="same")(inputs)
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    different = torch.vmap(function, randomness="different")(inputs)
    assert not torch.allclose(different[0], different[1])
    assert not torch.allclose(different[1], different[2])
    again = torch.vmap(function, randomness="different")(inputs)
    assert not torch.allclose(different[0], again[0])


@each_kind
def test_vmap_with_given_seeds_draws_their_noise(row, backend):
    input = row.input()

    def function(x, seed):
        return function_of(row, noise=0.4, seed=seed)(x)

    seeds = torch.tensor([[3], [4]])
    found = torch.vmap(function, (None, 0))(input, seeds)
    assert_close(found, torch.stack([function(input, seed) for seed in seeds]), **CLOSE)


# Running statistics under transforms


@pytest.mark.parametrize("row", RUNNING, ids=lambda row: row.name)
def test_running_statistics_under_func_grad_are_folded_once_or_refused(row, backend):
    layer = row.make(track_running_stats=True, noise_train=0.0, dtype=torch.float64)
    expected = copy.deepcopy(layer)
    expected(row.input())
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with contextlib.suppress(RuntimeError):
        torch.func.grad(lambda x: layer(x).sin().sum())(row.input())
    refused = layer.num_batches_tracked == 0
    for name, buffer in layer.named_buffers():
        assert type(buffer) is torch.Tensor
        assert not torch._C._functorch.is_functorch_wrapped_tensor(buffer)
        wanted = before[name] if refused else expected.get_buffer(name)
        assert_close(buffer, wanted, **CLOSE)


@pytest.mark.parametrize("row", RUNNING, ids=lambda row: row.name)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_vmap_cannot_fold_running_statistics_and_says_so(row, momentum, backend):
    layer = row.make(track_running_stats=True, momentum=momentum, noise_train=0.0)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    inputs = torch.stack([row.input(torch.float32)] * 2)
    with pytest.raises(RuntimeError) as caught:
        torch.vmap(layer)(inputs)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])
    assert "running" in str(caught.value)
    assert "vmap" in str(caught.value)


@pytest.mark.parametrize("row", RUNNING, ids=lambda row: row.name)
def test_vmap_of_an_evaluating_layer_equals_a_loop(row, backend):
    layer = row.make(track_running_stats=True, dtype=torch.float64)
    layer(row.input())
    layer.eval()
    inputs = torch.stack([row.input(seed=n) for n in range(3)])
    assert_close(torch.vmap(layer)(inputs), torch.stack([layer(x) for x in inputs]), **CLOSE)


@pytest.mark.parametrize("row", RUNNING, ids=lambda row: row.name)
def test_functional_call_folds_into_the_buffers_it_is_given(row, backend):
    layer = row.make(track_running_stats=True, noise_train=0.0, dtype=torch.float64)
    expected = copy.deepcopy(layer)
    output = expected(row.input())
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    given = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    state = {**dict(layer.named_parameters()), **given}
    assert_close(torch.func.functional_call(layer, state, (row.input(),)), output)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])
        assert_close(given[name], expected.get_buffer(name))


# The raw ops


def raw_forward(row, backend, input, weight=None, bias=None, keep_stats=True):
    return torch.ops.normnorm.normal_norm_forward(
        input, None, None, None, weight, bias, None, None, None, False, keep_stats, *row.geometry,
        1e-5, 0.0, 1.0, 2, 0.0, 0, False, "", backend,
    )[0]  # fmt: skip


@each_kind
def test_raw_forward_op_passes_gradcheck(row, backend):
    assert gradcheck(partial(raw_forward, row, backend), leaves(row), fast_mode=True)


@each_kind
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("keep_stats", [True, False])
@pytest.mark.parametrize("derivative", ["grad", "jvp", "double backward"])
def test_raw_ops_differentiate_right_or_refuse(row, keep_stats, derivative, backend):
    """Whoever calls the ops himself gets a right derivative or an error, not a wrong number."""
    input = row.input()
    direction = torch.randn_like(input)

    def derive(function):
        if derivative == "grad":
            x = input.clone().requires_grad_()
            return torch.autograd.grad(scalar(function)(x), x)[0]
        if derivative == "jvp":
            return torch.func.jvp(function, (input,), (direction,))[1]
        x = input.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(scalar(function)(x), x, create_graph=True)
        return torch.autograd.grad((gradient * direction).sum(), x)[0]

    expected = derive(definition_of(row))
    try:
        found = derive(partial(raw_forward, row, backend, keep_stats=keep_stats))
    except RuntimeError:
        assert derivative == "jvp" or not keep_stats
        return
    assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_use_backend_inside_a_graph_keeps_each_layer_with_its_own(backend):
    """A backward pass follows the forward pass's backend, whatever is chosen by then."""
    row = KINDS[0]
    arguments = leaves(row)
    loss = function_of(row, noise=0.4, seed=3)(*arguments).sin().sum()
    expected = torch.autograd.grad(loss, arguments, retain_graph=True)
    with normnorm.use_backend("reference"):
        found = torch.autograd.grad(loss, arguments)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


FORWARD_MODES = {
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "jacfwd": lambda f, x, v: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x, v: torch.func.hessian(lambda x: f(x).pow(3).sum())(x),
}


@pytest.mark.parametrize("name", FORWARD_MODES)
def test_forward_mode_folds_the_running_statistics_once(name, cpu_backend):
    """And the derivative is that of the layer without any."""
    x, v = torch.randn(2, 6, 3, dtype=torch.float64)
    layer, plain, bare = (
        normnorm.BatchNormalNorm1d(3, noise_train=0.0, track_running_stats=tracks).double()
        for tracks in (True, True, False)
    )
    found, expected = (FORWARD_MODES[name](f, x, v) for f in (layer, bare))
    torch.testing.assert_close(found, expected)
    plain(x)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))

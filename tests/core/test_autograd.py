"""Derivatives: first, second and third, reverse and forward, and under every torch.func transform.

Numerical differences are the first judge (gradcheck and gradgradcheck), plain automatic
differentiation of the definition the second. Noise and its scale are constants: neither carries a
gradient.
"""

import copy
from functools import partial

import pytest
import raw_ops
import torch
from layer_table import KINDS, RUNNING
from raw_ops import channels_last
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close

import normnorm
from normnorm import reference
from normnorm.statistics import Row

each_kind = pytest.mark.parametrize("row", KINDS, ids=lambda row: row.kind)
each_running = pytest.mark.parametrize(
    "row", [row for row in KINDS if row in RUNNING], ids=lambda row: row.kind
)
# Relative to values of order one in float64, after a few dozen roundings.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def function_of(row, frozen=False, **settings):
    """The layer as a function of (input, weight, bias), by its functional form.

    ``frozen``: by running statistics that differ from channel to channel, lambda on either side
    of 1.
    """
    if frozen:
        ramp = torch.linspace(0.0, 1.0, row.shape[1], dtype=torch.float64)
        settings["running"] = (0.3 * ramp - 0.1, 0.5 + ramp, 0.4 + 1.3 * ramp)
    return partial(row.apply, **{"noise_train": 0.0, **settings})


def definition_of(row, **settings):
    """The same function, by the definition alone."""
    geometry = dict(zip(("kind", "num_groups", "normalized_ndim"), row.geometry, strict=True))
    return lambda *tensors: reference.normal_norm(*tensors, **geometry, **settings)[0]


def leaves(row, requires=(True, True, True)):
    """Float64 (input, weight, bias); None where ``requires`` says None."""
    layer = row.make(dtype=torch.float64)
    tensors = (row.input(), layer.weight.detach(), layer.bias.detach())
    return tuple(
        None if required is None else tensor.clone().requires_grad_(required)
        for tensor, required in zip(tensors, requires, strict=True)
    )


def constants(row):
    return leaves(row, (False, False, False))


def scalar(function):
    return lambda *arguments: function(*arguments).sin().sum()


# Against numerical differences


FUNCTIONS = {row.kind: (row, False) for row in KINDS} | {"frozen": (KINDS[0], True)}
SETTINGS = {
    "default": {}, "gradient-step": {"order": 1}, "half-step": {"alpha": 0.5},
    "no-step": {"alpha": 0.0}, "long-step": {"alpha": 1.7, "order": 1},
    "shifted-exponent": {"transform_eps": 1e-5**0.5}, "large-eps": {"eps": 0.1},
}  # fmt: skip


@pytest.mark.parametrize(("row", "frozen"), FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    ("settings", "fast_mode"),
    [
        *(pytest.param(SETTINGS[name], True, id=name) for name in ("default", "gradient-step")),
        *(
            pytest.param(settings, False, id=f"{name}-every-entry", marks=pytest.mark.slow)
            for name, settings in SETTINGS.items()
        ),
    ],
)
def test_first_and_second_derivatives_are_right(row, frozen, settings, fast_mode, backend):
    function, arguments = function_of(row, frozen, **settings), leaves(row)
    assert gradcheck(
        function, arguments, fast_mode=fast_mode, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip
    assert gradgradcheck(
        function, arguments, fast_mode=fast_mode, check_fwd_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize(
    ("row", "frozen"), [FUNCTIONS[name] for name in ("batch", "layer", "frozen")]
)
@pytest.mark.parametrize(
    "requires",
    [
        (True, False, True), (True, True, False), (False, True, None), (False, None, True),
        (True, None, None),
    ],
    ids=str,
)  # fmt: skip
def test_any_part_of_the_arguments_may_require_gradients_or_be_absent(
    row, frozen, requires, backend
):
    function, arguments = function_of(row, frozen), leaves(row, requires)
    assert gradcheck(function, arguments, fast_mode=True)
    assert gradgradcheck(function, arguments, fast_mode=True, check_fwd_over_rev=True)
    function(*arguments).square().sum().backward()
    for tensor, required in zip(arguments, requires, strict=True):
        assert tensor is None or (tensor.grad is not None) == required


@each_kind
@pytest.mark.parametrize("noise", [0.0, 0.6])
def test_derivatives_to_the_third_order_are_those_of_the_definition(row, noise, backend):
    found = []
    for function in (
        function_of(row, noise_train=noise, seed=11),
        definition_of(row, noise_train=noise, seed=torch.tensor([11])),
    ):
        arguments = leaves(row)
        output = function(*arguments)
        value, gradients = output.sin().sum(), []
        for order in range(3):
            gradients += torch.autograd.grad(value, arguments, create_graph=order < 2)
            value = sum(g.cos().sum() for g in gradients[-3:])
        found.append([output, *gradients])
    assert_close(*found, rtol=1e-7, atol=1e-7)


# The graph


@each_kind
def test_only_the_output_requires_a_gradient_and_only_where_one_is_wanted(row, backend):
    input, weight, bias = leaves(row)
    arguments = raw_ops.forward(row.config(backend), input, weight, bias)
    output, statistics, _ = torch.ops.normnorm.normal_norm_forward(*arguments)
    assert output.requires_grad
    assert not statistics.requires_grad
    assert statistics.shape == (len(Row), row.groups)
    function = function_of(row)
    assert not function(input.detach(), weight.detach(), bias.detach()).requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert not function(input, weight, bias).requires_grad


def test_an_inference_tensor_is_refused_before_running_statistics_move(backend):
    layer = normnorm.BatchNormalNorm1d(3)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.inference_mode():
        input = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="inference tensor cannot be saved"):
        layer(input)
    assert_close(layer.state_dict(), before, rtol=0, atol=0)
    layer.requires_grad_(False)(input)  # nothing is saved


@each_kind
def test_a_retained_graph_gives_the_same_gradients_again(row, backend):
    arguments = leaves(row)
    loss = scalar(function_of(row, noise_train=0.4))(*arguments)
    first = torch.autograd.grad(loss, arguments, retain_graph=True)
    assert_close(torch.autograd.grad(loss, arguments), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, arguments)


@each_kind
def test_inputs_changed_in_place_are_noticed_and_the_output_may_be_changed(row, backend):
    for changed in (0, 1):
        arguments = [tensor * 1.0 for tensor in leaves(row)]
        output = function_of(row)(*arguments)
        with torch.no_grad():
            arguments[changed].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
    arguments = leaves(row)
    found = torch.autograd.grad(function_of(row)(*arguments).mul_(2.0).relu_().sum(), arguments)
    plain = torch.relu(2.0 * function_of(row)(*arguments))
    assert_close(found, torch.autograd.grad(plain.sum(), arguments))


@each_kind
@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize("affine", [True, False])
def test_input_statistics_parameters_and_seed_alone_are_saved(row, noise, affine, backend):
    layer = row.make(dtype=torch.bfloat16, noise_train=noise)
    input, saved = row.input(torch.bfloat16).requires_grad_(), []
    parameters = (layer.weight, layer.bias) if affine else ()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed):
        function_of(row, noise_train=noise)(input, *parameters)
    allowed = [torch.empty(len(Row), row.groups), *parameters]
    allowed += [torch.empty(1, dtype=torch.int64)] if noise else []
    allowed = [(tuple(tensor.shape), tensor.dtype) for tensor in allowed]
    for tensor in saved:
        if tensor.data_ptr() != input.data_ptr():  # the input itself, no copy
            allowed.remove((tuple(tensor.shape), tensor.dtype))
    assert any(tensor.data_ptr() == input.data_ptr() for tensor in saved)


@each_running
def test_frozen_gradient_survives_a_later_change_of_the_running_statistics(row, backend):
    layer = row.make(dtype=torch.float64, track_running_stats=True)
    layer(row.input())
    layer.eval()
    input = row.input(seed=1).requires_grad_()
    expected = torch.autograd.grad(scalar(layer)(input), input)
    loss = scalar(layer)(input)
    layer.train()(row.input(seed=2))
    assert_close(torch.autograd.grad(loss, input), expected)


# torch.func


@each_kind
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_func_grad_and_vjp_equal_autograd(row, noise, backend):
    function, arguments = scalar(function_of(row, noise_train=noise, seed=5)), leaves(row)
    expected = torch.autograd.grad(function(*arguments), arguments)
    found = torch.func.grad(function, argnums=(0, 1, 2))(*constants(row))
    assert_close(found, expected, **CLOSE)
    value, pull_back = torch.func.vjp(function, *constants(row))
    assert_close(pull_back(torch.ones_like(value)), expected, **CLOSE)
    assert all(gradient.abs().max() > 0 for gradient in found)


@each_kind
@pytest.mark.parametrize(
    ("noise", "moving"), [(0.0, (0,)), (0.4, (1,)), (0.4, (2,)), (0.4, (0, 1, 2))], ids=str
)
def test_func_jvp_and_dual_numbers_equal_the_definition(row, noise, moving, backend):
    function = function_of(row, noise_train=noise, seed=5)
    definition = definition_of(row, noise_train=noise, seed=torch.tensor([5]))
    fixed = constants(row)
    points = tuple(fixed[i] for i in moving)
    directions = tuple(torch.randn_like(point) for point in points)

    def of_moving(one):
        def inner(*moved):
            arguments = list(fixed)
            for i, tensor in zip(moving, moved, strict=True):
                arguments[i] = tensor
            return one(*arguments)

        return inner

    expected = torch.autograd.functional.jvp(of_moving(definition), points, directions)
    found = torch.func.jvp(of_moving(function), points, directions)
    assert_close(found, expected, **CLOSE)
    assert found[1].abs().max() > 1e-3
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, d) for p, d in zip(points, directions, strict=True)]
        output = forward_ad.unpack_dual(of_moving(function)(*duals))
        assert_close(output.tangent, expected[1], **CLOSE)


@each_kind
@pytest.mark.parametrize(
    "names",
    [
        ("jacfwd",), ("jacrev",), ("jacfwd", "jacfwd"), ("jacfwd", "jacrev"), ("jacrev", "jacfwd"),
        ("jacrev", "jacrev"),
    ],
    ids="-of-".join,
)  # fmt: skip
def test_jacobians_and_hessians_by_every_nesting_equal_those_of_the_definition(row, names, backend):
    input = row.input()
    input = input[:, :, :2, :2] if input.dim() == 4 else input  # few elements
    found, expected = function_of(row), definition_of(row)
    if len(names) == 2:
        found, expected = scalar(found), scalar(expected)
        expected = partial(torch.autograd.functional.hessian, expected)
    else:
        expected = partial(torch.autograd.functional.jacobian, expected)
    for name in reversed(names):
        found = getattr(torch.func, name)(found)
    assert_close(found(input), expected(input), rtol=1e-8, atol=1e-8)


@each_kind
@pytest.mark.parametrize(
    "in_dims",
    [(0, None, None), (1, None, None), (None, 0, None), (None, None, 1), (0, 0, 0)],
    ids=str,
)
def test_vmap_equals_a_loop_whatever_is_batched(row, in_dims, backend):
    input, *parameters = constants(row)
    arguments = [
        tensor if dim is None else torch.stack([tensor, 1.3 * tensor + 0.1, 1.6 * tensor], dim)
        for tensor, dim in zip((channels_last(input), *parameters), in_dims, strict=True)
    ]
    function = function_of(row)
    expected = torch.stack([
        function(*(
            tensor if dim is None else tensor.select(dim, n)
            for tensor, dim in zip(arguments, in_dims, strict=True)
        ))
        for n in range(3)
    ])  # fmt: skip
    assert_close(torch.vmap(function, in_dims)(*arguments), expected, **CLOSE)


@each_kind
def test_per_sample_gradients_equal_a_loop(row, backend):
    layer = row.make(dtype=torch.float64, noise_train=0.0)
    if row.kind == "batch":
        layer.eval()  # frozen: one sample alone has the others' statistics
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    state = (parameters, dict(layer.named_buffers()))

    def loss(parameters, sample):
        return scalar(partial(torch.func.functional_call, layer))((parameters, state[1]), sample)

    gradient, inputs = torch.func.grad(loss), row.input().unsqueeze(1)
    found = torch.vmap(gradient, (None, 0))(parameters, inputs)
    singles = [gradient(parameters, sample) for sample in inputs]
    for name, gradients in found.items():
        assert_close(gradients, torch.stack([single[name] for single in singles]), **CLOSE)
        assert gradients.abs().max() > 0


@each_kind
@pytest.mark.parametrize("differentiated", [False, True], ids=["values", "gradients"])
def test_vmap_noise_is_the_same_or_different_or_refused_as_asked(row, differentiated, backend):
    inputs = torch.stack([row.input()] * 3)
    function = function_of(row, noise_train=0.4)
    if differentiated:
        function = torch.func.grad(scalar(function))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(function)(inputs)
    same = torch.vmap(function, randomness="same")(inputs)
    assert torch.equal(same, same[:1].expand_as(same))
    different = torch.vmap(function, randomness="different")
    first, again = different(inputs), different(inputs)
    drawn = [*first, again[0]]
    assert not any(torch.allclose(a, b) for a, b in zip(drawn, drawn[1:] + drawn[:1], strict=True))


@each_kind
def test_vmap_with_given_seeds_draws_their_noise(row, backend):
    input = row.input()

    def function(seed):
        return function_of(row, noise_train=0.4, seed=seed)(input)

    seeds = torch.tensor([[3], [4]])
    assert_close(torch.vmap(function)(seeds), torch.stack(list(map(function, seeds))), **CLOSE)


# Running statistics under transforms


TRANSFORMS = {
    "grad": lambda f, x, v: torch.func.grad(scalar(f))(x),
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "jacfwd": lambda f, x, v: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x, v: torch.func.hessian(scalar(f))(x),
}


@each_running
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_folds_the_running_statistics_once(name, row, backend):
    """And the derivative is that of the layer without any."""
    x, v = row.input(), row.input(seed=1)
    layer, bare = (
        row.make(track_running_stats=tracks, noise_train=0.0, dtype=torch.float64)
        for tracks in (True, False)
    )
    plain = copy.deepcopy(layer)
    plain(x)
    found, expected = (TRANSFORMS[name](f, x, v) for f in (layer, bare))
    assert_close(found, expected)
    for key, buffer in layer.named_buffers():
        assert not torch._C._functorch.is_functorch_wrapped_tensor(buffer)
        assert_close(buffer, plain.get_buffer(key), **CLOSE)


@each_running
@pytest.mark.parametrize("momentum", [0.1, None])
def test_vmap_cannot_fold_running_statistics_and_says_so(row, momentum, backend):
    layer = row.make(track_running_stats=True, momentum=momentum, noise_train=0.0)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"running.*vmap|vmap.*running"):
        torch.vmap(layer)(torch.stack([row.input(torch.float32)] * 2))
    assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)


@each_running
def test_functional_call_folds_into_the_buffers_it_is_given(row, backend):
    layer = row.make(track_running_stats=True, noise_train=0.0, dtype=torch.float64)
    expected, state = copy.deepcopy(layer), copy.deepcopy(layer.state_dict())
    before = copy.deepcopy(dict(layer.named_buffers()))
    output = expected(row.input())
    assert_close(torch.func.functional_call(layer, state, (row.input(),)), output)
    assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)
    assert_close(dict(state), dict(expected.state_dict()))


# The raw ops


@each_kind
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("keep_stats", [True, False])
@pytest.mark.parametrize("derivative", ["grad", "jvp", "double backward"])
def test_raw_ops_differentiate_right_or_refuse(row, keep_stats, derivative, backend):
    input = row.input()
    direction = torch.randn_like(input)

    def raw_forward(x):
        arguments = raw_ops.forward(row.config(backend), x, keep_stats=keep_stats)
        return torch.ops.normnorm.normal_norm_forward(*arguments)[0]

    def derive(function):
        if derivative == "jvp":
            return torch.func.jvp(function, (input,), (direction,))[1]
        x = input.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(scalar(function)(x), x, create_graph=True)
        if derivative == "grad":
            return gradient
        return torch.autograd.grad((gradient * direction).sum(), x)[0]

    if derivative == "jvp" or not keep_stats:
        with pytest.raises(RuntimeError):
            derive(raw_forward)
    else:
        assert_close(derive(raw_forward), derive(definition_of(row)), rtol=1e-8, atol=1e-8)

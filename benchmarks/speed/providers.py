"""Implementations to benchmark: our backends, torch's layers, compiled layers, other libraries.

A provider turns a :class:`~speed.case.Case` into a :class:`~speed.case.Runner`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from normnorm import backends, reference
from normnorm import functional as F
from normnorm.backends.reference import fold_running_
from normnorm.noise import draw_seed
from speed.case import Case, Runner, sums_in_storage
from speed.work import EPS, Work


class Unavailable(RuntimeError):
    """This provider does not do this work; its text says why."""


@dataclass(frozen=True)
class Provider:
    """One implementation."""

    name: str  # as in :class:`speed.results.Row`
    # Makes it ready for a case; raises Unavailable for work it does not do.
    build: Callable[[Case], Runner]
    missing: Callable[[torch.device], str | None] = lambda device: None  # why it cannot run there
    within: Callable[[], AbstractContextManager[Any]] = nullcontext  # the context of every call
    normality: bool = True  # whether it computes normality normalization; else torch's
    compiled: bool = False  # whether it compiles first, which takes seconds
    # How much further than others it may be from the reference, for a known reason.
    allowance: Callable[[Case], float] = lambda case: 0.0


# Ours


def _layer(case: Case, ours: bool = True) -> Runner:
    module = case.module(ours)
    return Runner(module, module.weight, module.bias)


def _backend(name: str) -> Provider:
    def missing(device: torch.device) -> str | None:
        reason = backends.available_backends()[name]
        if reason is None:
            served = backends.get(name).device_type
            if served not in (None, device.type):
                return f"backend '{name}' serves {served} tensors"
        return reason

    return Provider(
        f"normnorm-{name}", _layer, missing, lambda: backends.use_backend(name), allowance=_normals
    )


def _normals(case: Case) -> float:
    """Allowance for a GPU's normals: its logarithm instruction has an absolute error of 2^-22 near
    1, so that the radius of a pair, the root of twice that, is off by up to sqrt(2^-21). Errors
    are relative to the largest output, which is above 4 normals."""
    return 2.0**-10.5 / 4 if case.device.type == "cuda" and case.work.mode == "noise" else 0.0


def _definition(case: Case) -> Runner:
    """The definition, operation by operation under autograd, all intermediates kept. (The reference
    backend, "normnorm-reference", keeps the input alone and recomputes the forward pass.)"""
    work, module = case.work, case.module(ours=True)
    training = work.mode != "eval"
    running = None
    if work.kind == "batch":
        running = (module.running_mean, module.running_var, module.running_lmbda)
    config: dict[str, Any] = {
        "kind": work.kind, "num_groups": work.groups, "eps": EPS,
        "normalized_ndim": 1 if work.kind == "layer" else 0,
        "noise_train": module.noise_train if training else 0.0,
        "channels_last": work.memory_format == "channels_last",
    }  # fmt: skip

    def forward(x: Tensor) -> Tensor:
        frozen = None
        if running is not None and not training:
            frozen = reference.pack_running(*running, EPS, torch.float32)
        seed = draw_seed(x.device) if config["noise_train"] else None
        output, statistics = reference.normal_norm(
            x, module.weight, module.bias, seed=seed, frozen=frozen, **config
        )
        if running is not None and training:
            fold_running_(
                statistics, *running, module.num_batches_tracked, module.momentum,
                work.group_size, EPS, "reference",
            )  # fmt: skip
        return output

    return Runner(forward, module.weight, module.bias)


def _no_compiler(device: torch.device) -> str | None:
    if device.type == "cuda" and find_spec("triton") is None:
        return "torch.compile needs Triton on a GPU, which is not installed"
    return None


def _compile(function: Callable[..., Tensor], case: Case, *more: Any) -> Callable[..., Tensor]:
    """Compiled for one shape, without graph breaks, and without donated buffers: a backward pass is
    repeated after one forward pass, so that gradients must not overwrite what was saved."""
    from torch._functorch import config

    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    # The first call compiles, and reads the setting.
    with config.patch(donated_buffer=False), torch.set_grad_enabled(case.work.mode != "eval"):
        compiled(case.inputs[0], *more)
    return compiled


def _compiled_reference(case: Case) -> Runner:
    """Our layer compiled as a function of input and seed: compiled code draws other random numbers
    than eager code does."""
    work, module = case.work, case.module(ours=True)
    function = getattr(F, f"{work.kind}_normal_norm")
    config: dict[str, Any] = {
        "training": work.mode != "eval", "eps": EPS, "noise_train": module.noise_train,
    }  # fmt: skip
    # The arguments between the input and the weight.
    before: dict[str, tuple[Any, ...]] = {
        "layer": (work.shape[-1:],), "group": (work.groups,), "instance": (None, None, None),
    }  # fmt: skip
    if work.kind == "batch":
        before["batch"] = module.running_mean, module.running_var, module.running_lmbda
        config["num_batches_tracked"] = module.num_batches_tracked

    def call(x: Tensor, seed: Tensor | None) -> Tensor:
        return function(x, *before[work.kind], module.weight, module.bias, seed=seed, **config)

    def seed() -> Tensor | None:
        return draw_seed(case.device) if work.mode == "noise" else None

    compiled = _compile(call, case, seed())
    return Runner(lambda x: compiled(x, seed()), module.weight, module.bias)


# torch's


@contextmanager
def _cudnn(enabled: bool) -> Iterator[None]:
    now = torch.backends.cudnn
    # torch may forbid plain assignment in favour of this context.
    with now.flags(
        enabled=enabled, benchmark=now.benchmark, benchmark_limit=now.benchmark_limit,
        deterministic=now.deterministic,
    ):  # fmt: skip
        yield


def _running_sums(case: Case) -> float:
    """torch's layer norm on a CPU adds up the gradients of weight and bias row by row in the
    dtype of the input (seen in torch 2.13: equal bit for bit to a running sum in bfloat16)."""
    affected = case.device.type == "cpu" and case.work.kind == "layer"
    return sums_in_storage(case.work) if affected else 0.0


def _with_cudnn(case: Case) -> Runner:
    runner = _layer(case, ours=False)
    with torch.enable_grad():
        output = runner.forward(case.inputs[0])
    if "Cudnn" not in type(output.grad_fn).__name__:
        raise Unavailable("torch does not use cuDNN for this layer, dtype and memory format")
    return runner


def _no_cudnn(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"cuDNN serves cuda tensors; the device is {device.type}"
    return None if torch.backends.cudnn.is_available() else "this torch has no cuDNN"


def _compiled_torch(case: Case) -> Runner:
    runner = _layer(case, ours=False)
    runner.forward = _compile(runner.forward, case)
    return runner


# Others


def _library(module: str, package: str) -> Callable[[torch.device], str | None]:
    def missing(device: torch.device) -> str | None:
        if find_spec(module) is None:
            return f"{package} is not installed"
        return None if device.type == "cuda" else f"{package} serves cuda tensors"

    return missing


def _require_rows(work: Work, library: str) -> None:
    if work.kind != "layer":
        raise Unavailable(f"{library} is measured on LayerNorm")


def _liger(case: Case) -> Runner:
    _require_rows(case.work, "Liger")
    from liger_kernel.transformers import LigerLayerNorm

    module = LigerLayerNorm(case.work.shape[-1], eps=EPS)
    module.to(device=case.device, dtype=case.parameter_dtype)
    with torch.no_grad():
        module.weight.copy_(case.weight)
        module.bias.copy_(case.bias)
    return Runner(module, module.weight, module.bias)


def _quack(case: Case) -> Runner:
    _require_rows(case.work, "quack")
    if len(case.work.shape) != 2:
        raise Unavailable("quack's LayerNorm takes rows, inputs of two dimensions")
    from quack.rmsnorm import layernorm_bwd, layernorm_fwd

    class LayerNorm(torch.autograd.Function):
        """quack's forward and backward kernels as one differentiable function."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
            output, rstd, mean = layernorm_fwd(
                x, weight, bias, EPS, return_rstd=True, return_mean=True
            )
            ctx.save_for_backward(x, weight, rstd, mean)
            return output

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
            x, weight, rstd, mean = ctx.saved_tensors
            return layernorm_bwd(x, weight, grad, rstd, mean)

    # Its parameters have to be float32.
    weight, bias = (t.float().requires_grad_() for t in (case.weight, case.bias))
    return Runner(lambda x: LayerNorm.apply(x, weight, bias), weight, bias)


def _copy(case: Case) -> Runner:
    """Into allocated memory: the roof of a kernel of one read and one write."""
    outputs = [torch.empty_like(x) for x in case.inputs]
    places = {id(x): output for x, output in zip(case.inputs, outputs, strict=True)}
    return Runner(lambda x: places[id(x)].copy_(x.detach()), case.weight, case.bias)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            "torch", partial(_layer, ours=False), within=lambda: _cudnn(False), normality=False,
            allowance=_running_sums,
        ),
        Provider("cudnn", _with_cudnn, _no_cudnn, lambda: _cudnn(True), normality=False),
        _backend("cpu"),
        _backend("cuda"),
        _backend("triton"),
        _backend("reference"),
        Provider("reference", _definition),
        Provider(
            "compiled-reference", _compiled_reference, _no_compiler,
            lambda: backends.use_backend("reference"), compiled=True,
        ),
        Provider(
            "compiled-torch", _compiled_torch, _no_compiler, normality=False, compiled=True
        ),
        Provider("liger", _liger, _library("liger_kernel", "liger-kernel"), normality=False),
        Provider("quack", _quack, _library("quack", "quack-kernels"), normality=False),
        Provider("copy", _copy, normality=False),
    )
}  # fmt: skip


def runnable(device: torch.device) -> dict[str, str | None]:
    """Every provider's name, with None where it can run on a device and the reason where not."""
    return {name: provider.missing(device) for name, provider in PROVIDERS.items()}

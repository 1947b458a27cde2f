"""``normnorm doctor``: versions, backends with the reason why one cannot run, and a check of their
results. ``normnorm doctor --plan SHAPE``: the CUDA kernels selected for a tensor."""

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

import torch

from . import backends, environment, selfcheck
from .backends import cuda
from .checks import check_forward
from .config import KINDS, Config, ForwardArguments

# One dtype that is stored as computed and one that is rounded.
_CHECKED = (torch.float32, torch.bfloat16)
_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
_PLAN_OPTIONS = (
    "kind", "dtype", "memory_format", "num_groups", "normalized_ndim", "no_noise", "no_affine",
    "device_model", "sms",
)  # fmt: skip


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if min(shape, default=0) < 1:
        raise argparse.ArgumentTypeError(
            f"a shape is sizes of 1 or more, 256,64,56,56 or 256x64x56x56; got {text!r}"
        )
    return shape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--no-checks", action="store_true", help="print versions and machine only")
    plan = parser.add_argument_group("CUDA kernels selected for a tensor (needs no GPU)")
    plan.add_argument(
        "--plan", metavar="SHAPE", type=_shape, help="print them for a shape such as 256,64,56,56"
    )
    # No defaults here, so that an option without --plan can be reported; plans() sets them.
    plan.add_argument("--kind", choices=KINDS, help="default: batch")
    plan.add_argument("--dtype", choices=tuple(_DTYPES), help="default: float32")
    plan.add_argument(
        "--memory-format", choices=("contiguous", "channels_last"), help="default: contiguous"
    )
    plan.add_argument("--num-groups", type=int, help="of kind group; default: 32")
    plan.add_argument("--normalized-ndim", type=int, help="of kind layer; default: 1")
    plan.add_argument("--no-noise", action="store_true", help="noise_train=0")
    plan.add_argument("--no-affine", action="store_true", help="without weight and bias")
    plan.add_argument(
        "--device-model",
        choices=tuple(cuda.DEVICE_MODELS),
        help="default: the GPU of this machine, else H200",
    )
    plan.add_argument("--sms", type=int, help="number of multiprocessors, default: the model's")


def _check_backends() -> list[dict[str, Any]]:
    """The worst error and the bound of every layer on every available backend."""
    checks = []
    for case, backend, device in selfcheck.cases_and_backends():
        for dtype in _CHECKED:
            check = selfcheck.described(case, backend, device, dtype)
            try:
                errors = selfcheck.worst_errors(case, backend, dtype, device)
            except Exception as failure:  # reported, since a broken installation may raise anything
                check.update(passed=False, failure=f"{type(failure).__name__}: {failure}")
            else:
                passed = all(error <= check["bound"] for error in errors.values())
                check.update(passed=passed, errors=errors)
            checks.append(check)
    return checks


def show_config(check: bool = True) -> dict[str, Any]:
    """What ``normnorm doctor --json`` prints: versions, machine, backends and a check of their
    results, for bug reports and logs.

    Args:
        check: whether to run every layer on every available backend, which takes seconds.

    Returns:
        A dictionary of plain data.

        * ``environment``: versions of normnorm, Python, torch, CUDA and Triton, commit, platform,
          processor, cores, threads, ``NORMNORM_BACKEND``, and a list of the GPUs.
        * ``backends``: each backend's name with None, or with the reason why it cannot run.
        * ``details``: how the available ``cpu`` and ``cuda`` kernels were built.
        * ``checks``: for each layer, mode, backend and dtype the ``errors`` of output, gradients
          and running statistics, relative to the largest value of each; their ``bound``; and
          whether they ``passed``. Empty if ``check`` is False.
        * ``build_failure``: the error if the last build of the compiled kernels failed, else None.
        * ``wrong_choice``: the error if ``NORMNORM_BACKEND`` cannot run, else None.
        * ``ok``: whether every check passed and neither error was found.
    """
    available = backends.available_backends()
    wrong_choice = None
    try:
        backends.resolve(torch.device("meta"), os.environ.get("NORMNORM_BACKEND", "auto"))
    except (ValueError, RuntimeError) as reason:
        wrong_choice = str(reason)
    build_failure = backends.cpu.build_failure()
    checks = _check_backends() if check else []
    details: dict[str, dict[str, Any]] = {}
    if available["cpu"] is None:
        details["cpu"] = dict(backends.cpu.info())
    if cuda.missing() is None:
        details["cuda"] = dict(cuda.info())
    gpus = (environment.gpu(torch.device("cuda", i)) for i in range(torch.cuda.device_count()))
    return {
        "environment": {
            **environment.facts(),
            "gpu": [dataclasses.asdict(gpu) for gpu in gpus if gpu],
        },
        "backends": available,
        "details": details,
        "checks": checks,
        "build_failure": build_failure,
        "wrong_choice": wrong_choice,
        "ok": build_failure is wrong_choice is None and all(check["passed"] for check in checks),
    }


def _print_report(found: dict[str, Any]) -> None:
    for name, value in found["environment"].items():
        if name == "gpu":
            value = "; ".join(", ".join(f"{k} {v}" for k, v in gpu.items()) for gpu in value)
        print(f"{name:18} {'-' if value in (None, '') else value}")
    print()
    for name, reason in found["backends"].items():
        print(f"{name:18} {'available' if reason is None else f'unavailable: {reason}'}")
        for key, value in found["details"].get(name, {}).items():
            print(f"{'':18}   {key}: {value}")
    if found["checks"]:
        _print_checks(found["checks"])
    if found["build_failure"] is not None:
        print(f"\nthe build of the compiled kernels failed:\n{found['build_failure']}")
    if found["wrong_choice"] is not None:
        chosen = found["environment"]["NORMNORM_BACKEND"]
        print(
            f"\nNORMNORM_BACKEND is {chosen!r}, with which every call of a layer raises:\n"
            f"{found['wrong_choice']}"
        )


def _print_checks(checks: list[dict[str, Any]]) -> None:
    print("\nforward and backward against the float64 reference (error relative to the largest")
    print("value, worst of output, gradients and running statistics):\n")
    print(f"{'layer':22}{'mode':10}{'backend':11}{'device':8}{'dtype':10}{'error':>9}{'bound':>9}")
    for check in checks:
        worst = max(check["errors"].values()) if "errors" in check else float("nan")
        print(
            f"{check['layer']:22}{check['mode']:10}{check['backend']:11}{check['device']:8}"
            f"{check['dtype']:10}{worst:9.1e}{check['bound']:9.1e}"
            f"{'' if check['passed'] else '  MISS'}"
        )
        if "failure" in check:
            print(f"  {check['failure']}")
    missed = sum(not check["passed"] for check in checks)
    print(f"\n{len(checks) - missed} checks passed, {missed} missed")


def plans(arguments: argparse.Namespace) -> dict[str, Any]:
    """The output of ``--plan`` as plain data. ValueError if no such layer takes a tensor of that
    shape, RuntimeError without CUDA kernels."""
    if arguments.sms is not None and arguments.sms < 1:
        raise ValueError(f"--sms must be positive; got {arguments.sms}")
    device, why = cuda.DEVICE_MODELS["H200"], "assumed: there is no GPU here"
    if arguments.device_model is not None:
        device, why = cuda.DEVICE_MODELS[arguments.device_model], "assumed, as asked"
    elif (here := cuda.current_device()) is not None:
        device, why = here, "the GPU of this machine"
    if arguments.sms is not None:
        device = device._replace(multiprocessors=arguments.sms)
    kind, memory_format = arguments.kind or "batch", arguments.memory_format or "contiguous"
    dtype_name = arguments.dtype or "float32"
    input = torch.empty(arguments.plan, dtype=_DTYPES[dtype_name], device="meta")
    if memory_format == "channels_last":
        if input.dim() < 3:
            raise ValueError(f"channels_last wants (N, C, spatial...); got {arguments.plan}")
        input = input.movedim(1, -1).contiguous().movedim(-1, 1)
    num_groups, ndim = arguments.num_groups, arguments.normalized_ndim
    options: dict[str, Any] = {
        "num_groups": num_groups if num_groups is not None else 32 if kind == "group" else 0,
        "normalized_ndim": ndim if ndim is not None else 1 if kind == "layer" else 0,
        "noise": not arguments.no_noise,
        "affine": not arguments.no_affine,
    }
    # The kernels check this too; here it reports wrong shapes where there are no kernels.
    config = Config(kind, options["num_groups"], options["normalized_ndim"])
    check_forward(ForwardArguments(input, *(None,) * 8, False, False, config), shard=True)
    return {
        "shape": list(arguments.plan),
        "kind": kind,
        "dtype": dtype_name,
        "memory_format": memory_format,
        **options,
        "device": {**device._asdict(), "source": why},
        **{
            name: cuda.plan(input, kind, device, backward=backward, **options)._asdict()
            for name, backward in (("forward", False), ("backward", True))
        },
    }


def _print_plans(found: dict[str, Any]) -> None:
    device, forward = found["device"], found["forward"]
    shape = ", ".join(map(str, found["shape"]))
    print(f"kind {found['kind']}, shape ({shape}), {found['dtype']}, {found['memory_format']}")
    print(
        f"on {device['name']} ({device['source']}): {device['multiprocessors']} multiprocessors, "
        f"{device['shared_bytes'] // 1024} KiB of shared memory a block, "
        f"{'' if device['clusters'] else 'no '}clusters"
    )
    print(
        f"{forward['groups']} groups of {forward['group_size']} elements, "
        f"in the {forward['layout']} layout\n"
    )
    widths = {"threads": 9, "blocks": 8, "thread_groups": 15, "waves": 7, "workspace": 11}
    heads = "".join(f"{name.replace('_', ' '):>{width}}" for name, width in widths.items())
    print(f"{'':10}{'groups are kept in':46}{heads}")
    for name in ("forward", "backward"):
        plan = found[name]
        numbers = "".join(f"{plan[column]:{width}}" for column, width in widths.items())
        print(f"{name:10}{plan['tier']:46}{numbers}")
    what = "tile of columns" if forward["layout"] == "columns" else "group"
    print(
        f"\nthreads of a block; blocks of a thread group, which processes one {what} at a time;\n"
        f"thread groups that run at the same time, or all where a pass streams; waves: how many\n"
        f"each processes one after the other; workspace in bytes"
    )


def _run_plan(arguments: argparse.Namespace) -> int:
    try:
        found = plans(arguments)
    except (RuntimeError, ValueError) as reason:
        print(f"no plan: {reason}", file=sys.stderr)
        return 2 if isinstance(reason, ValueError) else 1
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        _print_plans(found)
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Prints the report or a plan. Exit status 1 if a check missed its bound, the build of the
    kernels failed, NORMNORM_BACKEND cannot run, or there are no CUDA kernels to plan for; 2 for
    options without --plan."""
    if arguments.plan is not None:
        return _run_plan(arguments)
    values = {name: getattr(arguments, name) for name in _PLAN_OPTIONS}
    given = [name for name, value in values.items() if value is not None and value is not False]
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        print(f"options of --plan SHAPE, which was not given: {options}", file=sys.stderr)
        return 2
    found = show_config(check=not arguments.no_checks)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        _print_report(found)
    return 0 if found["ok"] else 1

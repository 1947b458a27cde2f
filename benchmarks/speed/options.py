"""From the command line to what is going to be measured; refuses what makes no sense."""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from commands import check_folder, check_output, positive, usable_device
from normnorm.cli import CommandError
from speed.networks import NETWORK_PROVIDERS, Network, networks
from speed.providers import PROVIDERS, runnable
from speed.results import MODES, PASSES, MemoryFormat
from speed.timing import Settings
from speed.work import DTYPES, LAYERS, Preset, Work, named_shapes, preset


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be sizes joined by x, such as 32x64x56x56; got {text!r}"
        ) from None


def parser() -> argparse.ArgumentParser:
    """The benchmark's options and its ``compare``, for :func:`normnorm.cli.execute`."""
    parser = argparse.ArgumentParser(
        prog="bench.py", description="Times every layer beside torch's, compiled and copied."
    )
    select = parser.add_argument_group("what is measured")
    size = select.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true",
        help="three shapes, no compilation, two small networks: within a minute on two cores",
    )  # fmt: skip
    size.add_argument("--full", action="store_true", help="every shape, dtype and provider: hours")
    some: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    select.add_argument("--layers", **some, help="layer classes, such as BatchNormalNorm2d")
    select.add_argument(
        "--shape", nargs="+", type=_shape, metavar="NxCxHxW",
        help="inputs of these shapes instead of the preset's",
    )  # fmt: skip
    select.add_argument("--suites", **some, help="parts of the preset, such as resnet or small")
    select.add_argument("--dtype", **some, help="float32, bfloat16, float16")
    select.add_argument("--memory-format", **some, help="contiguous, channels_last")
    select.add_argument(
        "--modes", **some, help="noise (training), quiet (training without noise), eval"
    )
    select.add_argument("--operations", **some, help="forward, backward, full")
    select.add_argument("--providers", **some, help="an unknown name lists them")
    select.add_argument(
        "--networks", nargs="*", metavar="NAME",
        help="train these networks (without names: the preset's), and measure layers only if a "
        "layer, shape or suite is named too",
    )  # fmt: skip
    select.add_argument("--no-networks", action="store_true", help="layers alone")
    select.add_argument(
        "--callgrind", action="store_true",
        help="count the instructions of the CPU kernels too (needs valgrind and a C++ compiler)",
    )  # fmt: skip
    method = parser.add_argument_group("how")
    method.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    method.add_argument(
        "--threads", metavar="N", type=positive(int, "a whole number of at least 1"),
        help="torch's threads",
    )  # fmt: skip
    method.add_argument(
        "--budget", metavar="SECONDS", type=positive(float, "a number of seconds above 0"),
        help="time for the samples of one operation, all providers together (default: 1.5; "
        "0.4 with --quick, 3 with --full; 0.4 times that on a GPU)",
    )  # fmt: skip
    method.add_argument("--seed", type=int, default=20250505, help="of the random inputs")
    out = parser.add_argument_group("files")
    out.add_argument("--json", type=Path, metavar="FILE", help="everything, environment included")
    out.add_argument("--csv", type=Path, metavar="FILE", help="layers, in Liger's columns")
    out.add_argument("--markdown", type=Path, metavar="FILE", help="the tables")
    out.add_argument("--png", type=Path, metavar="FOLDER", help="the plots, a file each")
    # Otherwise argparse shows a page of options, and the comparison as if it were required.
    parser.usage = f"{parser.prog} [options]\n       {parser.prog} compare A.json B.json"
    actions = parser.add_subparsers(dest="action", metavar="compare", prog=parser.prog)
    compare = actions.add_parser(
        "compare", help="what became slower between two result files, with the noise beside it"
    )
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")
    parser.set_defaults(run=_run, extra="bench")
    return parser


def _run(args: argparse.Namespace) -> int:
    from speed.main import bench, compare  # needs the packages of the extra

    return compare(args) if args.action == "compare" else bench(args)


@dataclass(frozen=True)
class Plan:
    """What is going to be measured."""

    device: torch.device
    works: list[Work]
    providers: list[str]  # of the layers
    compile_all: bool  # whether compiled ones do all of the work, or training with noise alone
    networks: list[Network]
    network_providers: list[str]  # whose norm layers they get
    callgrind: bool  # whether to count instructions
    settings: Settings
    outputs: dict[str, Path]  # files to write, by format

    def providers_for(self, work: Work) -> list[str]:
        """Compiling takes longer than measuring: unless it was asked for by name or the preset is
        the full one, only training with noise is compiled."""
        return [
            name
            for name in self.providers
            if self.compile_all or work.mode == "noise" or not PROVIDERS[name].compiled
        ]


def _chosen(given: Sequence[str] | None, known: Collection[str], what: str) -> list[str]:
    """The names that were given, separated by spaces or commas, each once.

    Raises:
        CommandError: one of them is not known.
    """
    names = [name for part in given or () for name in part.split(",") if name]
    for name in names:
        if name not in known:
            raise CommandError(f"unknown {what} {name!r}; there are {', '.join(known)}")
    return list(dict.fromkeys(names))


def _providers(args: argparse.Namespace, device: torch.device, size: Preset) -> list[str]:
    can = runnable(device)
    chosen = _chosen(args.providers, PROVIDERS, "provider")
    for name in chosen:
        if can[name] is not None:
            raise CommandError(f"provider {name!r} cannot run here: {can[name]}")
    return chosen or [
        name
        for name, reason in can.items()
        if reason is None
        # The backend that is written to be right, not fast, takes part in the full preset alone.
        and (size == "full" or name != "normnorm-reference")
        and (size != "quick" or not PROVIDERS[name].compiled)
    ]


def _works(args: argparse.Namespace, device: torch.device, size: Preset) -> list[Work]:
    chosen = {
        "layer": _chosen(args.layers, LAYERS, "layer"),
        "mode": _chosen(args.modes, MODES, "mode"),
        "memory_format": _chosen(args.memory_format, get_args(MemoryFormat), "memory format"),
    }
    operations = _chosen(args.operations, PASSES, "operation") or list(PASSES)
    dtypes = _chosen(args.dtype, DTYPES, "dtype")
    layers = chosen["layer"]
    if args.shape and args.suites:
        raise CommandError("--suites are parts of a preset; --shape replaces the preset's shapes")
    if args.shape:
        works = named_shapes(layers, args.shape, size, device.type)
    else:
        works = preset(size, device.type)
        # A layer that the quick preset leaves out is taken from the default one.
        if size == "quick" and not {work.layer for work in works} >= set(layers):
            works = preset("default", device.type)
        chosen["suite"] = _chosen(args.suites, dict.fromkeys(w.suite for w in works), "suite")
    works = [
        replace(work, operations=tuple(o for o in work.operations if o in operations))
        for work in works
        if all(getattr(work, name) in names for name, names in chosen.items() if names)
    ]
    if dtypes:  # also those that the preset leaves out
        works = list(dict.fromkeys(replace(w, dtype=dtype) for w in works for dtype in dtypes))
    works = [work for work in works if work.operations]
    if not works:
        raise CommandError("nothing is left to measure: no work of the preset fits every option")
    return works


def _networks(args: argparse.Namespace, device: torch.device, size: Preset) -> list[Network]:
    if args.networks is not None and args.no_networks:
        raise CommandError("--networks and --no-networks contradict each other")
    narrowed = args.layers or args.shape or args.suites or args.modes or args.operations
    if args.no_networks or (args.networks is None and narrowed):
        return []
    there = networks(size, device.type)
    chosen = _chosen(args.networks, dict.fromkeys(net.name for net in there), "network")
    found = [net for net in there if not chosen or net.name in chosen]
    dtypes = _chosen(args.dtype, DTYPES, "dtype")
    if dtypes == ["float16"]:
        raise CommandError("networks train in float32 or bfloat16; add --no-networks for layers")
    if dtypes:
        wanted = [dtype for dtype in dtypes if dtype != "float16"]
        found = list(dict.fromkeys(replace(n, dtype=dtype) for n in found for dtype in wanted))
    return found


def _outputs(args: argparse.Namespace) -> dict[str, Path]:
    """The files to write. Refused now if they cannot be, not when everything is measured."""
    given = {name: getattr(args, name) for name in ("json", "csv", "markdown", "png")}
    outputs = {name: path for name, path in given.items() if path is not None}
    seen: dict[Path, str] = {}
    for name, path in outputs.items():
        other = seen.setdefault(path.resolve(), name)
        if other != name:
            raise CommandError(f"--{other} and --{name} name the same file: {path}")
        if name == "png":
            check_folder(path)
        else:
            check_output(f"--{name}", path)
    return outputs


def make_plan(args: argparse.Namespace) -> Plan:
    """What the options ask for.

    Raises:
        CommandError: something unknown, something that cannot run or be written here, a shape that
            does not fit its layer, or nothing at all.
    """
    size: Preset = "quick" if args.quick else "full" if args.full else "default"
    if args.device is not None and args.device.split(":")[0] not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu or cuda; got {args.device!r}")
    device = usable_device(args.device, backend=False)  # every provider chooses its own
    budget, rounds = {"quick": (0.4, 3), "default": (1.5, 5), "full": (3.0, 7)}[size]
    if device.type == "cuda":
        budget *= 0.4  # device times scatter less
    providers = _providers(args, device, size)
    nets = _networks(args, device, size)
    layers_too = args.networks is None or args.layers or args.shape or args.suites
    works = _works(args, device, size) if layers_too else []
    network_providers = [name for name in NETWORK_PROVIDERS if name in providers]
    if nets and not network_providers:
        raise CommandError(f"networks need a provider among {', '.join(NETWORK_PROVIDERS)}")
    return Plan(
        device=device, works=works, providers=providers,
        compile_all=size == "full" or args.providers is not None, networks=nets,
        network_providers=network_providers, callgrind=args.callgrind,
        settings=Settings(args.budget or budget, rounds, 100, args.seed), outputs=_outputs(args),
    )  # fmt: skip

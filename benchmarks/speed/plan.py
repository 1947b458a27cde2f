"""From the command line to what is going to be measured; refuses what makes no sense."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from normnorm.commands import CommandError, check_output, usable_device
from speed.measure import Settings, estimated_seconds
from speed.networks import NETWORK_PROVIDERS, Network, networks
from speed.providers import PROVIDERS, runnable
from speed.results import Mode, Operation
from speed.work import (
    DTYPES,
    LAYERS,
    MemoryFormat,
    Preset,
    Work,
    WorkError,
    named_shapes,
    preset,
)

__all__ = ["Plan", "UsageError", "make_plan"]

# Left out unless asked for: the backend that is written to be right.
_ONLY_FULL = ("normnorm-reference",)


class UsageError(CommandError):
    """Something that cannot be measured, as a sentence for the user."""


@dataclass(frozen=True)
class Plan:
    """What is going to be measured.

    Attributes:
        device: where.
        works, providers: layers, and who does them.
        compile_all: whether compiled providers do all of the work, or training with noise alone.
        networks, network_providers: whole networks, and whose norm layers they get.
        callgrind: whether to count instructions.
        settings: how much.
        outputs: files to write, by format.
    """

    device: torch.device
    works: list[Work]
    providers: list[str]
    compile_all: bool
    networks: list[Network]
    network_providers: list[str]
    callgrind: bool
    settings: Settings
    outputs: dict[str, Path]

    def providers_for(self, work: Work) -> list[str]:
        """Who does one work. Compiling takes longer than measuring: unless it was asked for by
        name or the preset is the full one, only training with noise is compiled."""
        return [
            name
            for name in self.providers
            if self.compile_all or work.mode == "noise" or not PROVIDERS[name].compiled
        ]

    def work_seconds(self, work: Work) -> float:
        return estimated_seconds(work, self.providers_for(work), self.settings)

    def seconds(self) -> float:
        """Roughly how long it takes."""
        layers = sum(map(self.work_seconds, self.works))
        return layers + len(self.networks) * self.network_seconds() + 60 * self.callgrind

    def network_seconds(self) -> float:
        return 2 * self.settings.budget_s + 3 * len(self.network_providers)


def _chosen(given: Sequence[str] | None, known: Collection[str], what: str) -> list[str]:
    """The names that were given, separated by spaces or commas, each once.

    Raises:
        UsageError: one of them is not known.
    """
    names = [name for part in given or () for name in part.split(",") if name]
    for name in names:
        if name not in known:
            raise UsageError(f"unknown {what} {name!r}; there are {', '.join(known)}")
    return list(dict.fromkeys(names))


def _device(text: str | None) -> torch.device:
    if text is not None and text.split(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu or cuda; got {text!r}")
    return usable_device(text, backend=False)  # every provider chooses its own


def _providers(args: argparse.Namespace, device: torch.device, size: Preset) -> list[str]:
    can = runnable(device)
    chosen = _chosen(args.providers, PROVIDERS, "provider")
    for name in chosen:
        if can[name] is not None:
            raise UsageError(f"provider {name!r} cannot run here: {can[name]}")
    if chosen:
        return chosen
    return [
        name
        for name, reason in can.items()
        if reason is None
        and (size == "full" or name not in _ONLY_FULL)
        and (size != "quick" or not PROVIDERS[name].compiled)
    ]


def _keep(works: Iterable[Work], names: Sequence[str], field: Callable[[Work], str]) -> list[Work]:
    return [work for work in works if not names or field(work) in names]


def _with_dtypes(works: Sequence[Work], dtypes: Sequence[str]) -> list[Work]:
    """The works in the dtypes asked for, also in those that the preset leaves out."""
    if not dtypes:
        return list(works)
    return list(dict.fromkeys(replace(w, dtype=dtype) for w in works for dtype in dtypes))


def _works(args: argparse.Namespace, device: torch.device, size: Preset) -> list[Work]:
    layers = _chosen(args.layers, LAYERS, "layer")
    modes = _chosen(args.modes, get_args(Mode), "mode")
    formats = _chosen(args.memory_format, get_args(MemoryFormat), "memory format")
    operations = _chosen(args.operations, get_args(Operation), "operation")
    dtypes = _chosen(args.dtype, DTYPES, "dtype")
    if args.shape:
        if args.suites:
            raise UsageError("--suites are parts of a preset; --shape replaces the preset's shapes")
        works = named_shapes(layers, args.shape, size, device.type)
    else:
        works = _keep(preset(size, device.type), layers, lambda work: work.layer)
        # A layer that the preset leaves out is taken from the next larger one.
        if layers and size == "quick" and {work.layer for work in works} != set(layers):
            works = _keep(preset("default", device.type), layers, lambda work: work.layer)
        suites = _chosen(args.suites, dict.fromkeys(w.suite for w in works), "suite")
        works = _keep(works, suites, lambda work: work.suite)
    works = _keep(works, modes, lambda work: work.mode)
    works = _keep(works, formats, lambda work: work.memory_format)
    works = _with_dtypes(works, dtypes)
    if operations:
        narrowed = [
            replace(work, operations=tuple(o for o in work.operations if o in operations))
            for work in works
        ]
        works = [work for work in narrowed if work.operations]
    if not works:
        raise UsageError("nothing is left to measure: no work of the preset fits every option")
    return works


def _networks(args: argparse.Namespace, device: torch.device, size: Preset) -> list[Network]:
    if args.networks is not None and args.no_networks:
        raise UsageError("--networks and --no-networks contradict each other")
    narrowed = args.layers or args.shape or args.suites or args.modes or args.operations
    if args.no_networks or (args.networks is None and narrowed):
        return []
    there = networks(size, device.type)
    chosen = _chosen(args.networks, dict.fromkeys(net.name for net in there), "network")
    found = [net for net in there if not chosen or net.name in chosen]
    dtypes = _chosen(args.dtype, DTYPES, "dtype")
    if "float16" in dtypes and len(dtypes) == 1:
        raise UsageError("networks train in float32 or bfloat16; add --no-networks for layers")
    wanted = [dtype for dtype in dtypes if dtype != "float16"]
    if wanted:
        found = list(dict.fromkeys(replace(n, dtype=dtype) for n in found for dtype in wanted))
    return found


def _outputs(args: argparse.Namespace) -> dict[str, Path]:
    """The files to write. Refused now if they cannot be, not when everything is measured."""
    given = {name: getattr(args, name) for name in ("json", "csv", "markdown", "png")}
    outputs = {name: path for name, path in given.items() if path is not None}
    seen: dict[Path, str] = {}
    for name, path in outputs.items():
        resolved = path.resolve()
        if resolved in seen:
            raise UsageError(f"--{seen[resolved]} and --{name} name the same file: {path}")
        seen[resolved] = name
        if name == "png":
            if path.exists() and not path.is_dir():
                raise UsageError(f"--png {path} is a file; a folder's name is wanted")
            if not resolved.parent.is_dir():
                raise UsageError(f"--png {path}: there is no folder {resolved.parent}")
        else:
            check_output(f"--{name}", path)
    return outputs


def make_plan(args: argparse.Namespace) -> Plan:
    """What the options ask for.

    Raises:
        UsageError: something unknown, something that cannot run or be written here, a shape that
            does not fit its layer, or nothing at all.
    """
    size: Preset = "quick" if args.quick else "full" if args.full else "default"
    device = _device(args.device)
    budget, rounds = {"quick": (0.4, 3), "default": (1.5, 5), "full": (3.0, 7)}[size]
    if device.type == "cuda":
        budget *= 0.4  # device times scatter less
    settings = Settings(args.budget or budget, rounds, 100, args.seed)
    try:
        providers = _providers(args, device, size)
        nets = _networks(args, device, size)
        layers_too = args.networks is None or args.layers or args.shape or args.suites
        works = _works(args, device, size) if layers_too else []
    except WorkError as error:
        raise UsageError(str(error)) from None
    network_providers = [name for name in NETWORK_PROVIDERS if name in providers]
    if nets and not network_providers:
        raise UsageError(f"networks need a provider among {', '.join(NETWORK_PROVIDERS)}")
    return Plan(
        device=device, works=works, providers=providers,
        compile_all=size == "full" or args.providers is not None, networks=nets,
        network_providers=network_providers, callgrind=args.callgrind, settings=settings,
        outputs=_outputs(args),
    )  # fmt: skip

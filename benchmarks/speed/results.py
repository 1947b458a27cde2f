"""What a benchmark run leaves behind: its rows, its environment, and the file they are kept in.

A result file is JSON: ``{"format": "normnorm-bench", "version": 1, "environment": {...},
"measurements": [...], "networks": [...], "counts": [...], "problems": [...], "complete": true}``.
The classes below are its schema, field by field; :func:`load` checks a file against them. Times
are milliseconds, sizes are bytes, rates are decimal (1 GB/s is 1e9 bytes a second).

What follows from other fields (GB/s, shares) is a property here and is not stored. Measuring and
writing need torch alone; :func:`load` needs msgspec.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from normnorm.cli import CommandError
from normnorm.environment import Gpu

FORMAT: Literal["normnorm-bench"] = "normnorm-bench"
VERSION: Literal[1] = 1

T = TypeVar("T")
R = TypeVar("R", bound="Row")
K = TypeVar("K")
LANES = 128  # instructions of single elements that a multiprocessor issues in a clock

Mode = Literal["noise", "quiet", "eval"]
Operation = Literal["forward", "backward", "full"]
Status = Literal["ok", "wrong", "failed", "unavailable"]
Method = Literal["wall", "graph", "stream"]
MemoryFormat = Literal["contiguous", "channels_last"]

MODES: dict[Mode, str] = {
    "noise": "training with noise", "quiet": "training without noise", "eval": "evaluation",
}  # fmt: skip
PASSES: dict[Operation, str] = {
    "forward": "forward", "backward": "backward", "full": "forward + backward",
}  # fmt: skip


class ResultsError(CommandError):
    """A result file that cannot be read or written; its text is a sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where and how the numbers came about."""

    timestamp: str  # when the run began, ISO 8601 in UTC
    command_line: str  # as it was typed
    normnorm: str  # this and the next two are versions
    torch: str
    python: str
    packages: dict[str, str]  # versions of other packages that take part, where installed
    cuda: str | None  # what torch was built with; None for a CPU build
    cudnn: str | None
    commit: str | None  # of the sources in git; None outside a repository
    uncommitted: bool | None  # whether tracked files differed from it
    backends: dict[str, str | None]  # by name None, or the reason why it cannot run
    platform: str  # operating system and architecture
    cpu: str  # the processor's name
    cores: int  # processors that this process may run on
    threads: int  # torch's
    isa: str | None  # instruction set of the CPU kernels; None without them
    load_before: float | None  # load average of the last minute; None where unknown
    device: Literal["cpu", "cuda"]  # where the tensors lay
    seed: int  # of the random inputs
    load_after: float | None = None
    seconds: float | None = None  # of the whole run
    gpu: Gpu | None = None  # with its clocks right after the run; None on a CPU

    @property
    def device_name(self) -> str:
        """The processor that the tensors lay on, by name."""
        return self.cpu if self.gpu is None else self.gpu.name


def input_words(shape: tuple[int, ...], groups: int, dtype: str, memory_format: str) -> str:
    """An input for readers: "32x64x56x56 float32 channels_last"."""
    words = ["x".join(map(str, shape)), *([f"{groups} groups"] if groups else []), dtype]
    return " ".join([*words, *([memory_format] if memory_format != "contiguous" else [])])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One provider's time for one piece of work."""

    # "normnorm-cpu", "normnorm-cuda", "normnorm-triton", "normnorm-reference" (our backends),
    # "reference" (the definition in eager mode), "compiled-reference", "torch" (torch's layer; on a
    # GPU without cuDNN), "cudnn", "compiled-torch", "liger", "quack", or "copy" (a device copy of
    # the input: the roof).
    provider: str
    dtype: str  # "float32", "bfloat16" or "float16"; for a network of the autocast region
    memory_format: MemoryFormat
    # "ok"; "wrong" (it missed the bound against the float64 reference and was not timed), "failed"
    # (it raised) or "unavailable" (it does not do this work, or is not installed). The measured
    # fields below are None then, or what was known by then.
    status: Status
    message: str | None = None  # the sentence that belongs to a status other than "ok"
    # Of the samples, milliseconds a call or training step.
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None  # samples taken
    calls: int | None = None  # within one sample
    warm_up: int | None = None  # calls before the first sample, beside those of the check
    ratio: float | None = None  # median over that of ``peer`` in the same run; None without a peer
    peer: str | None = None  # stands for torch's layer: the faster of "torch" and "cudnn"
    # The most that one call had allocated at a time, its inputs not counted.
    peak_bytes: int | None = None

    @property
    def times(self) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile in ms; NaN for what is not known."""
        median, low, high = (t or math.nan for t in (self.median_ms, self.p20_ms, self.p80_ms))
        return median, low, high


@dataclass(frozen=True, kw_only=True)
class Measurement(Row):
    """One pass of one layer."""

    layer: str  # the normality layer's class; for other providers its counterpart stands in
    shape: tuple[int, ...]  # the input's, logical, (N, C, ...) or (..., features)
    groups: int = 0  # channel groups of a GroupNormalNorm; 0 for other layers
    # "noise" (training as published), "quiet" (training with ``noise_train=0``) or "eval".
    # Providers without noise do the same work in the first two.
    mode: Mode
    operation: Operation  # "full" is forward and backward
    # "wall" (CPU, wall clock), "graph" (device time of a replayed CUDA graph whose inputs rotate)
    # or "stream" (GPU, wall clock of calls from Python, launches included, for small tensors).
    method: Method
    suite: str  # the question that the work belongs to, such as "resnet" or "row sweep"
    x_name: str  # the quantity that a sweep varies; "elements" otherwise
    x_value: float
    # What a kernel of one read and one write a pass moves: twice the input for a forward, three
    # times for a backward, the sum for both.
    model_bytes: int
    kept_bytes: int | None = None  # by autograd between forward and backward, each storage once
    # The largest difference from the float64 reference over results, relative to the largest value
    # of each; and what it had to stay under.
    error: float | None = None
    bound: float | None = None

    @property
    def work(self) -> tuple[object, ...]:
        """What was done, by any provider: equal for rows that may be compared."""
        return (
            self.layer, self.shape, self.groups, self.dtype, self.memory_format, self.mode,
            self.operation, self.method,
        )  # fmt: skip

    @property
    def input(self) -> str:
        return input_words(self.shape, self.groups, self.dtype, self.memory_format)

    @property
    def name(self) -> str:
        """The work for readers, its operation left out."""
        launches = ", launches included" if self.method == "stream" else ""
        return f"{self.layer} {self.input}, {MODES[self.mode]}{launches}"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def gb_per_s(self) -> float | None:
        """Model bytes over the median time."""
        return self.model_bytes / self.median_ms * 1e-6 if self.median_ms else None


@dataclass(frozen=True, kw_only=True)
class NetworkMeasurement(Row):
    """One training step (forward, loss, backward, optimizer) of a whole network."""

    network: str  # its name, such as "resnet50" or "vit_small"
    source: Literal["torchvision", "timm", "normnorm"]  # the last: a small one of ours
    norm: str  # class name of its normalization layers
    norm_layers: int  # how many of them it has
    batch: int  # samples a step
    sample_shape: tuple[int, ...]
    unit: Literal["images", "tokens"]  # what ``rate`` counts a second
    units: int  # of them a step

    @property
    def work(self) -> tuple[object, ...]:
        """What was done, by any provider: equal for rows that may be compared."""
        return (
            self.network, self.source, self.batch, self.sample_shape, self.dtype,
            self.memory_format,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """The work for readers."""
        words = [self.network, f"({self.source})", f"batch {self.batch}", self.dtype]
        words += [self.memory_format] if self.memory_format != "contiguous" else []
        return f"{' '.join(words)}, a training step"

    @property
    def rate(self) -> float | None:
        """Images or tokens a second."""
        return self.units / self.median_ms * 1e3 if self.median_ms else None


@dataclass(frozen=True, kw_only=True)
class Count:
    """Instructions that a kernel of ours executes for an element: a measure without noise.

    Those of the CPU kernels are counted by callgrind, those of the CUDA kernels in their machine
    code.
    """

    work: str  # layer kind and shape, or the kind of kernel
    mode: Mode
    operation: Operation  # "forward" or "backward"
    isa: str  # the instruction set that was counted: "avx2", "sm_90"
    dtype: str = "float32"
    instructions: float  # an element


def grouped(rows: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Rows by a key, in order."""
    groups: dict[K, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def with_ratios(rows: Iterable[R]) -> list[R]:
    """The rows of one work with their ratios to the faster of those that stand for torch's layer; a
    copy has none."""
    rows = list(rows)
    peers = [row for row in rows if row.provider in ("torch", "cudnn") and row.median_ms]
    if not peers:
        return rows
    peer = min(peers, key=lambda row: row.times[0])
    return [
        replace(row, ratio=row.median_ms / peer.times[0], peer=peer.provider)
        if row.median_ms and row.provider != "copy"
        else row
        for row in rows
    ]


@dataclass(kw_only=True)
class Results:
    """Everything one run found."""

    format: Literal["normnorm-bench"] = FORMAT
    version: Literal[1] = VERSION
    environment: Environment
    measurements: list[Measurement] = field(default_factory=list)  # in the order of the run
    networks: list[NetworkMeasurement] = field(default_factory=list)
    # Of the CUDA kernels on a GPU, of the CPU kernels where callgrind was asked.
    counts: list[Count] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # sentences about what failed or was wrong
    complete: bool = False  # False while the run goes on, and for ever if it was interrupted

    @property
    def rows(self) -> list[Measurement | NetworkMeasurement]:
        return [*self.measurements, *self.networks]

    def select(self, **fields: object) -> list[Measurement]:
        """The measurements whose fields have these values, in order.

        ``results.select(provider="torch", operation="full", status="ok")``
        """
        return [m for m in self.measurements if all(getattr(m, k) == v for k, v in fields.items())]

    def copy_of(self, row: Measurement) -> Measurement | None:
        """The device's copy of the same input: of the same mode where there is one."""
        same = ("shape", "dtype", "memory_format", "method")
        fields = {name: getattr(row, name) for name in same}
        copies = self.select(provider="copy", status="ok", **fields)
        return min(copies, key=lambda copy: copy.mode != row.mode, default=None)

    def share_of_copy(self, row: Measurement) -> float | None:
        """Its GB/s over those of a copy of the same input in this run: 1 is the roof."""
        copy = self.copy_of(row)
        if copy is None or copy.gb_per_s is None or row.gb_per_s is None:
            return None
        return row.gb_per_s / copy.gb_per_s

    def share_of_issue(self, row: Measurement) -> float | None:
        """The time in which the multiprocessors could issue its instructions, over its time.

        The second roof of a GPU's kernels: counted instructions, every one of the 128 lanes of a
        multiprocessor at the highest clock. None for other providers and devices, and where
        the instructions were not counted.
        """
        gpu = self.environment.gpu
        if gpu is None or not gpu.max_clock_mhz or not row.median_ms:
            return None
        key = (row.mode, f"sm_{gpu.capability[0]}{gpu.capability[1]}", row.dtype)
        counted = {
            c.operation: c.instructions for c in self.counts if (c.mode, c.isa, c.dtype) == key
        }
        passes: tuple[Operation, ...] = (row.operation,)
        if row.operation == "full":
            passes = ("forward", "backward")
        if row.provider != "normnorm-cuda" or not counted.keys() >= set(passes):
            return None
        each = sum(counted[operation] for operation in passes)
        per_ms = gpu.multiprocessors * LANES * gpu.max_clock_mhz * 1e3
        return row.elements * each / per_ms / row.median_ms


def load(path: str | os.PathLike[str]) -> Results:
    """Reads a result file.

    Raises:
        ResultsError: the file cannot be read, is damaged, or was written by something else or by
            a newer version. The sentence names the file and what is wrong.
    """
    import msgspec

    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Results)
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror or error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultsError(
            f'{path} is damaged, or no "{FORMAT}" file of version {VERSION}: {error}'
        ) from None


def save(results: Results, path: str | os.PathLike[str]) -> None:
    """Writes a result file by :func:`write_atomically`."""
    write_atomically(path, json_text(results))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: object, indent: int = 1) -> str:
    """Dataclasses, dicts, lists and numbers as JSON and a newline; null for a number that is not
    finite, since JSON has no name for it."""
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Puts a text (UTF-8) or bytes into a file in one step; no half-written file is ever seen.

    Raises:
        ResultsError: it cannot be written there; what stood there is unchanged.
    """
    target = Path(os.path.realpath(path))  # through a link: what it points to is replaced
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ResultsError(f"cannot write {path}: {error.strerror or error}") from None

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
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from normnorm.cli import CommandError
from normnorm.environment import Gpu

FORMAT: Literal["normnorm-bench"] = "normnorm-bench"
VERSION: Literal[1] = 1

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
    """Where and how the numbers came about.

    Attributes:
        timestamp: when the run began, ISO 8601 in UTC.
        command_line: the command as it was typed.
        normnorm, torch, python: versions.
        packages: versions of the other packages that take part ("triton", "liger-kernel",
            "quack-kernels", "torchvision", "timm"), where installed.
        cuda, cudnn: what torch was built with; None for a CPU build.
        commit: the git commit of the sources; None outside a repository.
        uncommitted: whether tracked files differed from it.
        backends: every backend's name with None, or the reason why it cannot run.
        platform: operating system and architecture.
        cpu: the processor's name.
        cores: processors that this process may run on.
        threads: torch's threads.
        isa: instruction set of the CPU kernels; None without them.
        load_before, load_after: load average of the last minute; None where unknown.
        seconds: how long the whole run took.
        device: "cpu" or "cuda", where the tensors lay.
        gpu: the accelerator, with its clocks right after the run; None on a CPU.
        seed: of the random inputs.
    """

    timestamp: str
    command_line: str
    normnorm: str
    torch: str
    python: str
    packages: dict[str, str]
    cuda: str | None
    cudnn: str | None
    commit: str | None
    uncommitted: bool | None
    backends: dict[str, str | None]
    platform: str
    cpu: str
    cores: int
    threads: int
    isa: str | None
    load_before: float | None
    device: Literal["cpu", "cuda"]
    seed: int
    load_after: float | None = None
    seconds: float | None = None
    gpu: Gpu | None = None

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
    """One provider's time for one piece of work.

    Attributes:
        provider: "normnorm-cpu", "normnorm-cuda", "normnorm-triton", "normnorm-reference" (our
            backends), "reference" (the definition in eager mode), "compiled-reference", "torch"
            (torch's layer; on a GPU without cuDNN), "cudnn", "compiled-torch", "liger", "quack",
            or "copy" (a device copy of the input: the roof).
        dtype: "float32", "bfloat16" or "float16"; for a network of the autocast region.
        memory_format: "contiguous" or "channels_last".
        status: "ok"; "wrong" (it missed the bound against the float64 reference and was not
            timed), "failed" (it raised) or "unavailable" (it does not do this work, or is not
            installed). The measured fields below are None then, or what was known by then.
        message: the sentence that belongs to a status other than "ok".
        median_ms, p20_ms, p80_ms: of the samples, milliseconds a call or training step.
        rounds: samples taken.
        calls: calls within one sample.
        warm_up: calls before the first sample, beside those of the check.
        ratio: median over that of ``peer`` in the same run; None without a peer.
        peer: the provider that stands for torch's layer: the faster of "torch" and "cudnn".
        peak_bytes: the most that one call had allocated at a time, its inputs not counted.
    """

    provider: str
    dtype: str
    memory_format: MemoryFormat
    status: Status
    message: str | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    calls: int | None = None
    warm_up: int | None = None
    ratio: float | None = None
    peer: str | None = None
    peak_bytes: int | None = None

    @property
    def times(self) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile in ms; NaN for what is not known."""
        median, low, high = (t or math.nan for t in (self.median_ms, self.p20_ms, self.p80_ms))
        return median, low, high


@dataclass(frozen=True, kw_only=True)
class Measurement(Row):
    """One pass of one layer.

    Attributes:
        layer: the normality layer's class name; for other providers its counterpart stands in.
        shape: the input's, logical, (N, C, ...) or (..., features).
        groups: channel groups of a GroupNormalNorm; 0 for other layers.
        mode: "noise" (training as published), "quiet" (training with ``noise_train=0``) or
            "eval". Providers without noise do the same work in the first two.
        operation: "forward", "backward" or "full" (forward and backward).
        method: "wall" (CPU, wall clock), "graph" (device time of a replayed CUDA graph whose
            inputs rotate) or "stream" (GPU, wall clock of calls from Python: what small tensors
            cost, launches included).
        suite: which question the work belongs to, such as "resnet", "features", "tokens",
            "batch sweep", "channel sweep", "row sweep", "small".
        x_name, x_value: the quantity a sweep varies and its value; "elements" otherwise.
        model_bytes: bytes that a kernel of one read and one write a pass moves: twice the input
            for a forward, three times for a backward, the sum for both.
        kept_bytes: what autograd keeps between forward and backward, each storage once.
        error: largest difference from the float64 reference over results, relative to the
            largest value of each.
        bound: what ``error`` had to stay under.
    """

    layer: str
    shape: tuple[int, ...]
    groups: int = 0
    mode: Mode
    operation: Operation
    method: Method
    suite: str
    x_name: str
    x_value: float
    model_bytes: int
    kept_bytes: int | None = None
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
    """One training step (forward, loss, backward, optimizer) of a whole network.

    Attributes:
        network: its name, such as "resnet50" or "vit_small".
        source: where it comes from: "torchvision", "timm" or "normnorm" (a small one of ours).
        norm: class name of its normalization layers.
        norm_layers: how many of them it has.
        batch: samples a step.
        sample_shape: the shape of one.
        unit: what ``rate`` counts a second: "images" or "tokens".
        units: of them a step.
    """

    network: str
    source: Literal["torchvision", "timm", "normnorm"]
    norm: str
    norm_layers: int
    batch: int
    sample_shape: tuple[int, ...]
    unit: Literal["images", "tokens"]
    units: int

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

    Attributes:
        work: layer kind and shape, or the kind of kernel.
        mode: as in :class:`Measurement`.
        operation: "forward" or "backward".
        isa: the instruction set that was counted: "avx2", "sm_90".
        dtype: of the elements.
        instructions: an element.
    """

    work: str
    mode: Mode
    operation: Operation
    isa: str
    dtype: str = "float32"
    instructions: float


@dataclass(kw_only=True)
class Results:
    """Everything one run found.

    Attributes:
        environment: where and how.
        measurements: layers, in the order of the run.
        networks: whole training steps.
        counts: instruction counts: of the CUDA kernels on a GPU, of the CPU kernels where
            callgrind was asked.
        problems: sentences about what failed or was wrong; empty when all went well.
        complete: False while the run goes on, and for ever if it was interrupted.
    """

    format: Literal["normnorm-bench"] = FORMAT
    version: Literal[1] = VERSION
    environment: Environment
    measurements: list[Measurement] = field(default_factory=list)
    networks: list[NetworkMeasurement] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    complete: bool = False

    def select(self, **fields: object) -> list[Measurement]:
        """The measurements whose fields have these values, in order.

        ``results.select(provider="torch", operation="full", status="ok")``
        """
        return [m for m in self.measurements if all(getattr(m, k) == v for k, v in fields.items())]

    def copy_of(self, row: Measurement) -> Measurement | None:
        """The device's copy of the same input: of the same mode where there is one."""
        same = ("shape", "dtype", "memory_format", "method")
        key = {name: getattr(row, name) for name in same}
        copies = self.select(provider="copy", status="ok", **key)
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
    """Writes a result file, whole or not at all.

    Raises:
        ResultsError: it cannot be written there; what stood there is unchanged.
    """
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

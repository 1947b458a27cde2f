"""The machine code that nvcc makes of csrc/cuda, and its instructions an element.

``python .../sass.py`` prints the counts of the probes; with ``--update`` it stores
them as the budgets that ``test_cuda_static.py`` holds the kernels to.
"""

import collections
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from host_cuda import torch_library

ROOT = Path(__file__).resolve().parents[3]
PROBES = Path(__file__).with_name("probes.cu")
BUDGETS = ROOT / "tests/data/sass_budgets.json"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
FLAGS = ("-std=c++20", "-O3")
# Compiled with host code, which is the same for all architectures.
HOST = "sm_90"
# elements of a thread in the probe "many" minus those in "few"
PROBE_ELEMENTS = {"forward": 32, "backward": 16}
# numbers that a thread keeps of an element between the rounds: the template argument of TileCache
PLANES = {"forward": 1, "backward": 3}


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, beside nvcc, or in a Python package that has it."""
    folders = []
    if nvcc := shutil.which("nvcc"):
        folders.append(Path(nvcc).resolve().parent)
    for package, inside in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin")):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            folders.append(Path(place) / inside)
    return shutil.which(name) or next((str(f / name) for f in folders if (f / name).exists()), None)


def missing() -> str | None:
    """Why machine code cannot be read here, or None."""
    absent = [t for t in ("nvcc", "cuobjdump", "nvdisasm", "c++filt") if not tool(t)]
    return f"not found: {', '.join(absent)}" if absent else None


@cache
def nvcc_version() -> str:
    text = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def _sources() -> list[Path]:
    folders = (ROOT / "csrc/cuda", ROOT / "csrc/common", ROOT / "csrc/math")
    return sorted(p for f in folders for p in f.iterdir() if p.is_file())


def _built(source: Path, architecture: str) -> Path | None:
    """The object that setup.py compiled for that architecture alone, from these sources."""
    for built in (ROOT / "build").glob(f"temp*/objects/cuda_{source.stem}.o"):
        codes = re.findall(r",code=(\w+)", built.with_name("build.ninja").read_text())
        newest = max(path.stat().st_mtime for path in _sources())
        if codes == [architecture] and built.stat().st_mtime > newest:
            return built
    return None


@cache
def compile_cubin(source: Path, architecture: str) -> Path:
    """A file with the machine code: the build's own, or compiled once for each state of the
    sources."""
    if built := _built(source, architecture):
        return built
    what = ["-c", "-Xcompiler", "-fPIC"] if architecture == HOST else ["-cubin"]
    command = [tool("nvcc"), *FLAGS, *what, f"-arch={architecture}", str(source), "-o"]

    def make(target: Path) -> None:
        done = subprocess.run([*command, target], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr

    state = torch_library.digest([PROBES, *_sources()], nvcc_version(), command)
    return torch_library.made(f"{source.stem}-{architecture}-{state}.o", make)


def _cuobjdump(option: str, cubin: Path) -> str:
    path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ["PATH"]])
    command = [tool("cuobjdump"), option, str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    # an enumerator is left as its number
    noise = re.compile(r"normnorm::cuda::|\(anonymous namespace\)::|^void ")
    plain = (noise.sub("", line).replace("(Finish)", "") for line in done.stdout.splitlines())
    return [line.partition("(")[0] for line in plain]


def _listings(cubin: Path) -> dict[str, list[tuple[int, str]]]:
    """Each kernel's instructions without predicates, with their addresses, by its name in the
    source."""
    functions: dict[str, list[tuple[int, str]]] = {}
    current: list[tuple[int, str]] | None = None
    for line in _cuobjdump("-sass", cubin).splitlines():
        if named := re.search(r"Function : (\S+)", line):
            current = functions.setdefault(named[1], [])
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(.*?)\s*;", line):
            instruction = re.sub(r"^@!?U?P\w+\s+", "", found[2])
            if current is not None and not instruction.startswith("NOP"):
                current.append((int(found[1], 16), instruction))
    return dict(zip(demangled(list(functions)), functions.values(), strict=True))


def instructions(cubin: Path) -> dict[str, list[str]]:
    """Each kernel's instructions without predicates, by its name in the source."""
    return {name: [i for _, i in code] for name, code in _listings(cubin).items()}


def resources(cubin: Path) -> dict[str, dict[str, int]]:
    """Of each kernel: registers (REG), stack frame (STACK), shared (SHARED), local (LOCAL)."""
    text = _cuobjdump("-res-usage", cubin)
    found = re.findall(r"Function (\S+?):\s*\n\s*(.*)", text)
    usage = [{k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)} for _, line in found]
    return dict(zip(demangled([name for name, _ in found]), usage, strict=True))


def launch_bounds(cubin: Path) -> dict[str, int]:
    """The most threads that a block of each kernel may have."""
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [tool("cuobjdump"), "-xelf", "all", str(cubin.resolve())]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        (extracted,) = Path(folder).iterdir()
        elf = extracted.read_bytes()
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<3H", elf, 58)
    sections = [struct.unpack_from("<2I4Q", elf, table + i * size) for i in range(count)]
    for name, *_, at, length in sections:
        start = sections[names][4] + name
        kernel = elf[start : elf.index(b"\0", start)].decode().partition(".nv.info.")[2]
        end = at + length
        while kernel and at < end:  # attributes: a format, a number, a value or the value's size
            kind, attribute, size = struct.unpack_from("<2BH", elf, at)
            if attribute == 5:  # EIATTR_MAX_THREADS
                (found[kernel],) = struct.unpack_from("<I", elf, at + 4)
            at += 4 + (size if kind == 4 else 0)
    return dict(zip(demangled(list(found)), found.values(), strict=True))


def _operations(code: list[str]) -> collections.Counter[str]:
    return collections.Counter(i.split(".")[0].split()[0] for i in code)


def _in_shared(code: list[tuple[int, str]], planes: int) -> tuple[float, float]:
    """Instructions, and those of special functions, an element of chunks in shared memory: of the
    loops with accesses to it. Such a loop moves four numbers an access, ``planes`` an element."""
    total = special = 0.0
    for end, jump in code:
        target = re.match(r"BRA\b.*?(0x[0-9a-f]+)", jump)
        if target and int(target[1], 16) < end:
            body = [i for at, i in code if int(target[1], 16) <= at <= end]
            loop = _operations(body)
            empty = body.count("LDS RZ, [RZ]")  # without effect, before an asynchronous copy
            if accesses := max(loop["LDS"] - empty, loop["STS"]):
                total += loop.total() * planes / (4 * accesses)
                special += loop["MUFU"] * planes / (4 * accesses)
    return total, special


def per_element(cubin: Path) -> dict[str, dict[str, float]]:
    """Instructions an element in each probe, and those of special functions, of chunks in
    registers ("forward_...") and in shared memory ("..._shared")."""
    found: dict[str, tuple[float, float]] = {}
    listings = _listings(cubin)
    for name in (n.removesuffix("_few") for n in listings if n.endswith("_few")):
        direction = name.split("_")[0]
        few, many = (_operations([i for _, i in listings[f"{name}_{n}"]]) for n in ("few", "many"))
        elements = PROBE_ELEMENTS[direction]
        found[name] = (
            (many.total() - few.total()) / elements, (many["MUFU"] - few["MUFU"]) / elements
        )  # fmt: skip
        found[f"{name}_shared"] = _in_shared(listings[f"{name}_few"], PLANES[direction])
    return {
        name: {"instructions": total, "special": special}
        for name, (total, special) in sorted(found.items())
    }


def main() -> None:
    measured = {a: per_element(compile_cubin(PROBES, a)) for a in ARCHITECTURES}
    for name in measured[ARCHITECTURES[0]]:
        row = "  ".join(f"{measured[a][name]['instructions']:6.2f}" for a in ARCHITECTURES)
        print(f"{name:28} {row}")
    if "--update" in sys.argv:
        stored = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
        stored[nvcc_version()] = measured
        BUDGETS.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

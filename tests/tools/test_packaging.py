"""What is installed: what it imports, what a wheel of it holds, and that it runs away from here."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import ninja
import pip
import pytest
import setuptools
import torch
import wheels

import normnorm
from normnorm.backends import cpu, cuda

ROOT = Path(__file__).parents[2]
OPTIONAL = ("matplotlib", "numpy", "scipy", "sklearn", "tqdm", "triton")
# A path of somebody's machine, in a file that everybody gets.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|mnt|opt|root|scratch|tmp/venv|Users|work)/")

# As if these were not installed.
BLOCK_OPTIONAL = f"""
import sys, warnings
sys.modules.update(dict.fromkeys({OPTIONAL}))
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
"""


def run(*command, cwd, status=0, **environment):
    """The command's output, errors included; the test fails with it if the exit status differs."""
    # The folder of the tests, and options meant for the process that runs them, stay out.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "NORMNORM"))}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=inherited | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, f"{command} exited {done.returncode}:\n{done.stdout}"
    return done.stdout


def project_files():
    """What is committed or about to be, links unfollowed, relative to the root."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout: which files belong to the project is not known here")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    names = (Path(name) for name in listed.split("\0") if name)
    return [name for name in names if os.path.lexists(ROOT / name)]


def test_import_brings_in_nothing_but_torch(tmp_path):
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


def test_doctor_runs_with_torch_alone(tmp_path):
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


# --- the build ------------------------------------------------------------------------------------


@pytest.fixture
def build(monkeypatch):
    """The module setup.py, which sets nothing up, with no variable that steers it."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("NORMNORM_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("normnorm_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def toolkit(folder):
    """A folder with a program that answers as nvcc 13.0 does, and compiles no kernel."""
    program = folder / "bin/nvcc"
    program.parent.mkdir(parents=True)
    program.write_text(
        """#!/bin/sh
case "$*" in
*--version*) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
*code=sm_137*) echo "nvcc fatal   : Unsupported gpu architecture 'compute_137'"; exit 1 ;;
*nv/target*) ;;
*) echo "this is no compiler" >&2; exit 1 ;;
esac
"""
    )
    program.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("asked", "understood"),
    [
        (None, ["8.0", "9.0", "10.0", "12.0+PTX"]),
        ("8.0;9.0 10.0+PTX", ["8.0", "9.0", "10.0+PTX"]),
        ("9.0a", ["9.0a"]),
        ("Hopper;9.0+PTX", ["9.0+PTX"]),
    ],
)
def test_the_architectures_are_those_of_torchs_variable(
    asked, understood, build, tmp_path, monkeypatch
):
    if asked is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    cuda = build.Cuda()
    assert cuda.architectures == understood
    assert cuda.version == "13.0"
    generated = [flag for flag in cuda.flags() if flag.startswith("-gencode")]
    assert len(generated) == len(understood) + sum("+PTX" in word for word in understood)
    if asked == "9.0a":
        assert generated == ["-gencode=arch=compute_90a,code=sm_90a"]


@pytest.mark.parametrize("asked", ["7.5", "13.7", "Volta"])
def test_an_architecture_that_cannot_be_is_refused_in_words(asked, build, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(build.Failed, match="TORCH_CUDA_ARCH_LIST") as refusal:
        build.Cuda()
    assert asked in str(refusal.value)


def test_the_cuda_binding_compiles_against_this_torch(build, tmp_path, monkeypatch):
    monkeypatch.setenv("CXXFLAGS", "-O0")
    try:
        toolkit = build.Cuda()
    except build.Failed as reason:
        pytest.skip(f"no CUDA toolkit: {reason}")
    (tmp_path / "build.ninja").write_text(build.ninja_file(tmp_path / "library", toolkit))
    rules = (ROOT / "csrc/cuda/build.ninja").read_text()
    objects = re.findall(r"^build (\S+): \w+ \$csrc/binding/", rules, re.MULTILINE)
    assert len(objects) == 3
    build.run(f"{ninja.BIN_DIR}/ninja", "-C", str(tmp_path), *objects)


def test_cuda_kernels_are_built_where_asked_for_alone(build, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    for word in ("", "0"):
        monkeypatch.setenv("NORMNORM_CUDA", word)
        assert build.find_cuda() is None
    monkeypatch.setenv("NORMNORM_CUDA", "1")
    assert build.find_cuda().version == "13.0"
    monkeypatch.setattr(build.Cuda, "places", staticmethod(list))
    for word, sentence in (("1", "no nvcc was found"), ("yes", "must be 0 or 1; got 'yes'")):
        monkeypatch.setenv("NORMNORM_CUDA", word)
        with pytest.raises(build.Failed, match=sentence):
            build.find_cuda()


def test_a_long_compilation_is_reported_every_ten_seconds(build, capsys):
    waits = []

    class Ended:
        def wait(self, seconds):
            waits.append(seconds)
            return len(waits) == 3

    build.report_time(Ended())
    assert waits == [10] * 3
    assert capsys.readouterr().out == "compiling for 10 s\ncompiling for 20 s\n"


def test_nvcc_is_also_found_in_a_python_package(build, tmp_path, monkeypatch):
    folder = toolkit(tmp_path / "nvidia/cu13")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert str(folder / "bin/nvcc") in build.Cuda.places()


FAILING = """
echo "In file included from csrc/math/projected_error.h:3:" >&2
echo "a.cpp:3:4: error: the first" >&2
echo "a.cpp:5:6: error: another" >&2
exit 1
"""


@pytest.mark.parametrize(
    ("steered", "program", "first_error"),
    [
        ({}, FAILING, "a.cpp:3:4: error: the first"),
        ({"CUDA_HOME": "../cuda", "NORMNORM_CUDA": "1"}, "exit 0", "this is no compiler"),  # nvcc's
    ],
    ids=["c++", "nvcc"],
)
def test_a_compiler_that_fails_stops_the_build_with_its_first_error(
    steered, program, first_error, tmp_path
):
    source = copy_project(tmp_path / "source")
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\n{program}\n")
    compiler.chmod(0o755)
    toolkit(tmp_path / "cuda")
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    *_, last = run(*build, cwd=source, status=1, CXX=str(compiler), **steered).splitlines()
    assert last.startswith("normnorm: the compiler failed: ")
    assert first_error in last
    assert "NORMNORM_NATIVE=0" in last
    program = "from normnorm.backends.cpu import *; print(build_failure(), unavailable_reason())"
    said = run(sys.executable, "-c", program, cwd=source)
    assert said.startswith("backend 'cpu' is unavailable: the build of the compiled kernels failed")
    assert said.count(first_error) == 3
    run(*build, cwd=source, NORMNORM_NATIVE="0")
    said = run(sys.executable, "-c", program, cwd=source)
    assert said.startswith("None the compiled kernels were left out at installation: NORMNORM_NAT")


def test_a_setuptools_that_is_too_old_is_named(request, monkeypatch):
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"setuptools 77 or newer, and this is 65\.5\.0"):
        request.getfixturevalue("build")


@pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf here")
def test_the_library_with_cuda_kernels_loads_with_and_without_cuda():
    """It asks for libtorch, which brings libtorch_cuda where there is one; what only that has is
    weak; and nobody else sees the CUDA runtime in it."""
    needed = run("readelf", "--dynamic", cpu.LIBRARY, cwd=ROOT)
    assert "[libtorch.so]" in needed
    assert "libcudart" not in needed
    assert "libtorch_cuda" not in needed
    symbols = run("readelf", "--dyn-syms", "--wide", cpu.LIBRARY, cwd=ROOT).splitlines()
    (stream,) = (line for line in symbols if "aoti_torch_get_current_cuda_stream" in line)
    assert " WEAK " in stream
    assert not [line for line in symbols if re.search(r"\bcuda[A-Z]", line)]


# --- the wheel ------------------------------------------------------------------------------------


class Built(NamedTuple):
    wheel: Path
    log: str


def build_wheel(source, folder, **environment):
    log = run(
        *(sys.executable, "-m", "pip", "wheel", "--verbose", "--no-index", "--no-deps"),
        *("--no-build-isolation", "--wheel-dir", folder, source),
        cwd=folder.parent,
        **environment,
    )
    (wheel,) = folder.glob("*.whl")
    return Built(wheel, log)


def copy_project(folder):
    for name in project_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    return folder


def install(wheel, folder):
    """A new environment with the wheel in it, which sees this one's torch and pip; its bin."""
    lent = {Path(module.__file__).parent.parent for module in (torch, pip)}
    return wheels.install(wheel, folder, sorted(lent))


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    """A wheel of this tree built without the compiled extension."""
    folder = tmp_path_factory.mktemp("pure")
    return build_wheel(copy_project(folder / "source"), folder / "dist", NORMNORM_NATIVE="0")


def test_build_without_the_extension_says_so_in_one_line(pure):
    (line,) = {s.strip() for s in pure.log.splitlines() if s.strip().startswith("normnorm:")}
    assert "NORMNORM_NATIVE" in line


def test_wheel_holds_the_package_and_nothing_else(pure):
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


def test_wheel_works_away_from_the_checkout(pure, tmp_path):
    binaries = install(pure.wheel, tmp_path / "environment")
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


# --- a copy under another name --------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The kernel folder that ``make hub`` lays out."""
    source = copy_project(tmp_path_factory.mktemp("hub") / "source")
    run("make", "hub", cwd=source)
    return source / "build/hub"


BESIDE = """
import torch
assert "normnorm" not in {name.partition(".")[0] for name in sys.modules}
reasons = copy.available_backends()
assert reasons["reference"] is reasons["triton"] is None, reasons
assert copy.__name__ in reasons["cpu"] and copy.__name__ in reasons["cuda"], reasons

import normnorm
namespace = copy.__name__.replace(".", "_")

def step(package, backend, compiled=False):
    torch.manual_seed(1)
    layer, input = package.BatchNormalNorm1d(6), torch.randn(32, 6, requires_grad=True)
    with package.use_backend(backend):
        call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        call(input).square().sum().backward()
    return input.grad, layer.weight.grad, layer.running_lmbda

expected = step(normnorm, "auto")
for backend, compiled in (("reference", False), ("triton", False), ("triton", True)):
    torch.testing.assert_close(step(copy, backend, compiled), expected, rtol=1e-4, atol=1e-4)
layer = copy.LayerNormalNorm(6).eval()
graph = torch.export.export(layer, (torch.randn(4, 6),))
assert f"torch.ops.{namespace}.normal_norm_forward" in str(graph)
assert namespace not in str(graph.run_decompositions(copy.decompositions()))
model = torch.nn.Sequential(normnorm.BatchNormalNorm1d(6), torch.nn.BatchNorm1d(6))
copy.replace_norms(model)
assert [type(layer) for layer in model] == [normnorm.BatchNormalNorm1d, copy.BatchNormalNorm1d]
"""


def test_the_package_imports_itself_relatively():
    absolute = []
    for folder in ("normnorm", "triton_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module]
                absolute += [path for name in names if name.partition(".")[0] == "normnorm"]
    assert absolute == []


def test_the_package_kernels_loads_a_copy_beside_the_installed_one(hub, tmp_path):
    pytest.importorskip("kernels")
    program = f"""
import sys, pathlib, kernels
copy = kernels.get_local_kernel(pathlib.Path({str(hub)!r}))
assert copy.__name__.startswith("normnorm_"), copy.__name__
"""
    offline = {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    run(sys.executable, "-c", program + BESIDE, cwd=tmp_path, **offline)


def test_another_package_can_contain_a_copy(hub, tmp_path):
    shutil.copytree(hub / "build/torch-cuda", tmp_path / "host/parts/norms")
    program = "import sys\nfrom host.parts import norms as copy"
    run(sys.executable, "-c", program + BESIDE, cwd=tmp_path, TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="auditwheel tags wheels of Linux")
def test_the_archive_builds_the_wheel_of_a_release(tmp_path):
    archive = wheels.build_archive(copy_project(tmp_path / "source"), tmp_path / "dist")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tmp_path / "unpacked")
    left_out = {str(p) for p in project_files() if not (ROOT / p).is_symlink()} - names
    assert {n for n in left_out if not n.startswith((".", "shared/"))} == set()
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = wheels.build_wheel(unpacked, tmp_path / "wheels", cuda=False)
    wheels.try_out(install(wheel, tmp_path / "environment"), "cpu")

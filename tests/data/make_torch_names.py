"""Writes torch_2_10_names.txt, the names of torch that its release 2.10 has.

    python tests/data/make_torch_names.py FOLDER

FOLDER holds an unpacked torch 2.10.0 wheel, of which the Python sources and stubs suffice:
``pip download --no-deps torch==2.10.0`` and ``unzip torch-*.whl 'torch/*.py' 'torch/*.pyi'``.
Nothing of it is imported. The candidates are the names that normnorm uses today and those in
MARGIN; the ones that 2.10 lacks are printed, and belong into GUARDED of test_torch_floor.py if
the use of them is guarded.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from torch_names import package_uses  # noqa: E402

HEADER = """\
# Names of torch that exist in torch 2.10, one a line, with the parameters of what can be called
# where they are known. Made by make_torch_names.py from the Python sources and type stubs of the
# distribution torch {version}; the candidates were the names normnorm uses and a margin.
"""

# What normnorm does not use today and plausibly will.
MARGIN = """
torch.Generator torch.Tag.needs_fixed_stride_order torch.Tag.nondeterministic_seeded
torch.Tag.pt2_compliant_tag torch.Tensor torch.Tensor.contiguous torch.Tensor.data_ptr
torch.Tensor.expand torch.Tensor.lerp_ torch.Tensor.mul_ torch.Tensor.permute torch.Tensor.sum
torch.Tensor.view torch.accelerator.current_accelerator torch.allclose torch.amp.autocast
torch.amp.custom_bwd torch.amp.custom_fwd torch.as_tensor torch.autograd.Function
torch.autograd.backward torch.autograd.function.once_differentiable torch.autograd.gradcheck
torch.autograd.gradgradcheck torch.autograd.graph.save_on_cpu
torch.backends.mha.set_fastpath_enabled torch.channels_last torch.channels_last_3d torch.compile
torch.compiler.allow_in_graph torch.compiler.disable torch.compiler.is_compiling
torch.compiler.is_exporting torch.contiguous_format torch.cuda.Event torch.cuda.current_device
torch.cuda.current_stream torch.cuda.device torch.cuda.get_device_capability
torch.cuda.get_device_name torch.cuda.get_device_properties torch.cuda.is_available
torch.cuda.max_memory_allocated torch.cuda.synchronize torch.distributed.ProcessGroup
torch.distributed.all_gather_into_tensor torch.distributed.all_reduce torch.distributed.get_rank
torch.distributed.get_world_size torch.distributed.group.WORLD torch.distributed.is_available
torch.distributed.is_initialized torch.empty torch.equal torch.export.export
torch.func.functional_call torch.func.grad torch.func.jacrev torch.func.jvp torch.func.vjp
torch.func.vmap torch.get_autocast_dtype torch.get_num_threads torch.get_rng_state torch.inf
torch.inference_mode torch.is_autocast_enabled torch.is_inference_mode_enabled
torch.library.Library torch.library.custom_op torch.library.impl torch.library.opcheck
torch.library.register_autocast torch.library.register_autograd torch.library.register_fake
torch.library.register_kernel torch.library.register_vmap torch.library.triton_op
torch.library.wrap_triton torch.linspace torch.load torch.manual_seed torch.memory_format
torch.nan torch.nn torch.nn.BatchNorm1d torch.nn.BatchNorm2d torch.nn.BatchNorm3d torch.nn.Conv2d
torch.nn.GroupNorm torch.nn.InstanceNorm1d torch.nn.InstanceNorm2d torch.nn.InstanceNorm3d
torch.nn.LayerNorm torch.nn.Linear torch.nn.Module torch.nn.Module.register_buffer
torch.nn.Module.register_load_state_dict_pre_hook torch.nn.Parameter torch.nn.RMSNorm
torch.nn.SyncBatchNorm torch.nn.functional torch.nn.functional.batch_norm
torch.nn.functional.cross_entropy torch.nn.functional.group_norm torch.nn.functional.instance_norm
torch.nn.functional.layer_norm torch.nn.functional.pad torch.nn.modules.batchnorm._NormBase
torch.nn.parameter.is_lazy torch.no_grad torch.ops.aten.add torch.ops.load_library
torch.optim.AdamW torch.optim.SGD torch.preserve_format torch.profiler.profile torch.rand
torch.random.fork_rng torch.save torch.set_num_threads torch.tensor torch.testing.assert_close
torch.utils.benchmark.Timer torch.utils.checkpoint.checkpoint
torch.utils.cpp_extension.CUDAExtension torch.utils.cpp_extension.CppExtension
torch.utils.data.DataLoader torch.version.cuda torch.version.hip torch.zeros
"""


@dataclass(frozen=True)
class Found:
    """Where a name leads: a module (no nodes), or what binds the name in one."""

    module: str
    nodes: tuple[ast.AST, ...] = ()


class Distribution:
    """The names of an unpacked torch, looked up in its sources as an import would find them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._resolving: set[tuple[str, str]] = set()

    def find(self, dotted: str) -> Found | None:
        if dotted.startswith("torch.ops.aten."):  # not in the sources; functions or methods call it
            name = dotted.split(".")[3]
            homes = ("torch._C._VariableFunctions", "torch._C._nn", "torch.Tensor")
            found = next(filter(None, (self.find(f"{home}.{name}") for home in homes)), None)
            # or only derivatives call it, and what says how it decomposes names it
            decompositions = self.folder / "torch/_decomp/decompositions.py"
            text = decompositions.read_text(encoding="utf-8")
            named = f"@register_decomposition(aten.{name})" in text
            return found or (Found("torch._decomp.decompositions") if named else None)
        here: Found | None = Found("torch")
        for part in dotted.split(".")[1:]:
            assert here is not None
            if not here.nodes:
                here = self._in_module(here.module, part)
            elif isinstance(here.nodes[0], ast.ClassDef):
                here = self._in_class(here, part)
            else:
                return here  # an attribute of a value: its type is not followed
            if here is None:
                return None
        return here

    def parameters(self, found: Found) -> list[str] | None:
        """Of a function, over all its overloads; of a class's constructor; None if unknown."""
        if found.nodes and isinstance(found.nodes[0], ast.ClassDef):
            constructors = [self._in_class(found, name) for name in ("__init__", "__new__")]
            return next((self.parameters(c) for c in constructors if c), None)
        names: dict[str, None] = {}
        functions = [n for n in found.nodes if isinstance(n, ast.FunctionDef)]
        for function in functions:
            a = function.args
            every = [*a.posonlyargs, *a.args, *a.kwonlyargs]
            names |= dict.fromkeys(x.arg for x in every if x.arg not in ("self", "cls"))
            names |= {"**": None} if a.kwarg else {}
        return list(names) if functions else None

    @cache  # noqa: B019 (one Distribution lives as long as the script)
    def _files(self, module: str) -> tuple[ast.Module, ...]:
        base = self.folder.joinpath(*module.split("."))
        paths = [base.with_suffix(".py"), base.with_suffix(".pyi")]
        paths += [base / "__init__.py", base / "__init__.pyi"]
        return tuple(ast.parse(p.read_text(encoding="utf-8")) for p in paths if p.is_file())

    @cache  # noqa: B019
    def _members(self, module: str) -> tuple[dict[str, list[ast.AST]], list[str]]:
        """What a module's top level binds, and the modules it takes everything from."""
        names: dict[str, list[ast.AST]] = {}
        # torch/__init__.py copies these two into itself in a loop, which no parser sees.
        stars = ["torch._C", "torch._C._VariableFunctions"] if module == "torch" else []
        for tree in self._files(module):
            for node in _statements(tree.body):
                if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                    stars.append(self._absolute(module, node))
                for name in _bound(node):
                    names.setdefault(name, []).append(node)
        return names, stars

    def _in_module(self, module: str, name: str) -> Found | None:
        if (module, name) in self._resolving:
            return None
        self._resolving.add((module, name))
        try:
            names, stars = self._members(module)
            nodes = names.get(name, [])
            for node in nodes:
                found = self._imported(module, node, name)
                if found:
                    return found
            nodes = [n for n in nodes if not isinstance(n, ast.Import | ast.ImportFrom)]
            # A definition says more than a bare assignment.
            nodes.sort(key=lambda n: not isinstance(n, ast.FunctionDef | ast.ClassDef))
            if nodes:
                return Found(module, tuple(nodes))
            if self._files(f"{module}.{name}"):
                return Found(f"{module}.{name}")
            return next(filter(None, (self._in_module(star, name) for star in stars)), None)
        finally:
            self._resolving.discard((module, name))

    def _imported(self, module: str, node: ast.AST, name: str) -> Found | None:
        if isinstance(node, ast.ImportFrom):
            source = self._absolute(module, node)
            if source.split(".")[0] != "torch":
                return Found(module, (node,))  # a value from elsewhere, such as math.inf
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            return self._in_module(source, original)
        if isinstance(node, ast.Import):
            full = next(a.name for a in node.names if (a.asname or a.name.split(".")[0]) == name)
            return self.find(full) if full.startswith("torch.") else None
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self.folder.joinpath(*module.split(".")).is_dir()
        parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
        return ".".join([*parents, *([node.module] if node.module else [])])

    def _in_class(self, owner: Found, name: str) -> Found | None:
        for cls in (n for n in owner.nodes if isinstance(n, ast.ClassDef)):
            nodes = [n for n in _statements(cls.body) if name in _bound(n)]
            if nodes:
                return Found(owner.module, tuple(nodes))
            for base in [*cls.bases, *(k.value for k in cls.keywords)]:  # a metaclass counts
                found = self._base(owner.module, base)
                inherited = self._in_class(found, name) if found else None
                if inherited:
                    return inherited
        return None

    def _base(self, module: str, base: ast.expr) -> Found | None:
        first, *rest = ast.unparse(base).split("[")[0].split(".")
        if first == "torch":
            return self.find(".".join([first, *rest]))
        found = self._in_module(module, first)
        for part in rest:
            found = self._in_module(found.module, part) if found else None
        return found


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """These statements and those inside their conditions and loops, not inside functions."""
    out: list[ast.stmt] = []
    for node in body:
        out.append(node)
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "finalbody"):
                out += _statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                out += _statements(handler.body)
    return out


def _bound(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import):
        return [a.asname or a.name.split(".")[0] for a in node.names]
    if isinstance(node, ast.ImportFrom):
        return [a.asname or a.name for a in node.names]
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return [n.id for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)]


def main(folder: str) -> None:
    torch_2_10 = Distribution(Path(folder))
    version = next(Path(folder).glob("torch-*.dist-info"), Path("torch-?.dist-info"))
    lines, missing = [], []
    for name in sorted(
        {*package_uses(HERE.parent.parent / "normnorm"), *MARGIN.split()} - {"torch"}
    ):
        found = torch_2_10.find(name)
        if found is None:
            missing.append(name)
            continue
        parameters = torch_2_10.parameters(found)
        lines.append(name if parameters is None else f"{name}({', '.join(parameters)})")
    header = HEADER.format(version=version.name.removesuffix(".dist-info").split("-")[1])
    (HERE / "torch_2_10_names.txt").write_text(header + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} names written; not in torch 2.10: {', '.join(missing) or 'none'}")


if __name__ == "__main__":
    main(*sys.argv[1:])

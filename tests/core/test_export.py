"""Exported layers run elsewhere with the same outputs: in a fresh process, in onnxruntime, compiled
ahead of time; with our ops, or by torch's own operations alone."""

import copy
import subprocess
import sys

import onnxruntime
import pytest
import raw_ops
import torch
from layer_table import KINDS, RUNNING, few
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import normnorm

CLOSE = {"rtol": 1e-5, "atol": 2e-6}  # float32, another order of the same operations
BATCH = ({0: torch.export.Dim("batch", min=1, max=64)},)


def trained(row, **keywords):
    """A layer whose running statistics have moved, in evaluation."""
    if row in RUNNING:
        keywords.setdefault("track_running_stats", True)
    layer = row.make(**keywords)
    for seed in range(3):
        layer(row.input(torch.float32, seed).exp())
    return layer.eval()


def batches(row):
    """Batches of the exported size and of others."""
    whole = torch.cat([row.input(torch.float32, seed) for seed in range(3)])
    return [whole[:size] for size in (len(row.input()), 5, 2)]


def ops_of(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def ours_in(program):
    """Whether an op of ours is in the graph, be it as an argument of a higher-order op."""
    return "normnorm" in str(program.graph)


# torch.export


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("row", few(KINDS, KINDS[:2]))
def test_exported_evaluation_agrees_with_the_op_and_decomposed(row, strict, cpu_backend):
    layer = trained(row)
    program = torch.export.export(layer, (batches(row)[0],), dynamic_shapes=BATCH, strict=strict)
    ours = "normnorm.normal_norm_forward.default"
    assert ours_in(program) == (ours in ops_of(program)) == (cpu_backend != "reference")
    plain = program.run_decompositions(normnorm.decompositions())
    assert not ours_in(plain)
    for input in batches(row):
        assert_close(program.module()(input), layer(input), **CLOSE)
        assert_close(plain.module()(input), layer(input), **CLOSE)


def test_decompositions_go_together_with_torch_s_own():
    layer = trained(KINDS[0])
    program = torch.export.export(layer, (batches(KINDS[0])[0],))
    normnorm.decompositions().clear()  # the table is the caller's own
    table = {**torch.export.default_decompositions(), **normnorm.decompositions()}
    plain = program.run_decompositions(table)
    assert not ours_in(plain)
    assert "aten.square.default" not in ops_of(plain)  # one that torch decomposes
    for seed in range(2):
        input = KINDS[0].input(torch.float32, seed)
        assert_close(plain.module()(input), layer(input), **CLOSE)


@pytest.mark.parametrize("row", few([row for row in KINDS if row in RUNNING], KINDS[:1]))
def test_exported_training_folds_the_running_statistics(row, cpu_backend):
    layer = row.make(noise_train=0.0, track_running_stats=True)
    eager = copy.deepcopy(layer)
    program = torch.export.export(layer, (row.input(torch.float32),))
    if cpu_backend == "reference":
        assert not ours_in(program)
        program = program.run_decompositions()
        assert not ours_in(program)
    module = program.module()
    for seed in range(2):
        input = row.input(torch.float32, seed)
        assert_close(module(input), eager(input), **CLOSE)
    found = dict(module.named_buffers())
    for name, buffer in eager.named_buffers():
        assert_close(found[name], buffer, rtol=1e-5, atol=1e-6)


def test_every_op_of_a_training_step_decomposes_in_make_fx():
    row, ops = KINDS[0], torch.ops.normnorm
    config = row.config("auto", noise_train=0.4)

    def step(input, weight, bias, seed, *running):
        affine = (weight, bias)
        output, stats, _ = ops.normal_norm_forward(
            *raw_ops.forward(config, input, *affine, seed=seed)
        )
        gradients = ops.normal_norm_backward(
            *raw_ops.backward(config, output.cos(), input, stats, *affine, seed=seed)
        )
        ops.fold_running_(stats, *running, None, 0.1, 24, 1e-5, "auto")
        return (output, *gradients, *running)

    def arguments():
        affine = [parameter.detach() for parameter in row.make().parameters()]
        return (row.input(torch.float32), *affine, torch.tensor([5]), *torch.ones(3, row.shape[1]))

    graph = make_fx(step, decomposition_table=normnorm.decompositions())(*arguments())
    assert "normnorm" not in graph.code
    assert_close(graph(*arguments()), step(*arguments()), rtol=1e-4, atol=1e-5)


RUN_ELSEWHERE = """
import sys
import torch
if sys.argv[2] == "with":
    import normnorm
program = torch.export.load(sys.argv[1] + "/program.pt2")
input, expected = torch.load(sys.argv[1] + "/tensors.pt")
torch.testing.assert_close(program.module()(input), expected, rtol=1e-5, atol=2e-6)
if sys.argv[2] == "without":
    assert "normnorm" not in sys.modules
print("equal")
"""


@pytest.mark.parametrize("normnorm_there", ["with", "without"])
def test_a_saved_program_runs_in_a_fresh_process(normnorm_there, tmp_path):
    layer = trained(KINDS[0])
    input = batches(KINDS[0])[0]
    program = torch.export.export(layer, (input,))
    if normnorm_there == "without":
        program = program.run_decompositions(normnorm.decompositions())
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((input, layer(input).detach()), tmp_path / "tensors.pt")
    run = subprocess.run(
        [sys.executable, "-c", RUN_ELSEWHERE, str(tmp_path), normnorm_there],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout.strip() == "equal", run.stderr


# ONNX


def run_onnx(program, path, inputs):
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [torch.from_numpy(session.run(None, {name: input.numpy()})[0]) for input in inputs]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("row", KINDS, ids=lambda row: row.kind)
def test_onnxruntime_gives_the_same(row, tmp_path):
    layer = trained(row)
    program = torch.onnx.export(
        layer, (batches(row)[0],), dynamo=True, verbose=False, dynamic_shapes=BATCH
    )
    assert {node.domain for node in program.model.graph} == {""}
    found = run_onnx(program, str(tmp_path / "layer.onnx"), batches(row))
    for output, input in zip(found, batches(row), strict=True):
        assert_close(output, layer(input).detach(), rtol=1e-5, atol=5e-6)


# AOTInductor


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "decomposed"),
    [(KINDS[0], False), *((row, True) for row in KINDS)],
    ids=lambda value: getattr(value, "kind", "decomposed" if value else "op"),
)
def test_packages_compiled_ahead_of_time_give_the_same(row, decomposed, tmp_path):
    layer = trained(row)
    dim = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(layer, (batches(row)[0],), dynamic_shapes=dim)
    if decomposed:
        program = program.run_decompositions(normnorm.decompositions())
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "layer.pt2")
    )
    compiled = torch._inductor.aoti_load_package(path)
    for input in batches(row):
        assert_close(compiled(input), layer(input), **CLOSE)

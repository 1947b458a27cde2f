"""The scripts for one question, on tensors as small as they can be: what they store and print."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch, request):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "record", raising=False)
    module = __import__(request.param)
    yield module
    torch.set_num_threads(1)
    sys.modules.pop(request.param)


def run(monkeypatch, module, output, *words):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words, "--output", str(output)])
    status = module.main()
    return status, json.loads(output.read_text()) if output.exists() else None


@pytest.mark.parametrize("script", ["fused"], indirect=True)
def test_what_fusing_saves_is_stored_and_printed(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "IMAGES", ((2, 3, 4, 5),))
    monkeypatch.setattr(script, "TOKENS", ((3, 8),))
    words = ["--budget", "0.001", "--threads", "1"]
    status, stored = run(monkeypatch, script, tmp_path / "f.json", *words)
    assert status == 0
    assert stored["format"] == "normnorm-fused"
    assert stored["environment"]["torch"] == torch.__version__
    assert len(stored["rows"]) == 3 * (1 + 2 * 2)
    kept = {(r["what"], r["way"]): r["kept_bytes"] for r in stored["rows"]}
    # The activation's output is kept either way; of a sum and its parts the sum alone.
    assert kept["relu", "fused"] == kept["relu", "in steps"]
    assert kept["residual stream", "fused"] == kept["residual stream", "in steps"]
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| r")]) == 5


@pytest.mark.parametrize("script", ["per"], indirect=True)
def test_what_the_projected_error_costs_is_stored_and_printed(
    script, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(script, "SHAPES", ((20, 3),))
    words = ["--budget", "0.001", "--threads", "1"]
    status, stored = run(monkeypatch, script, tmp_path / "p.json", *words)
    assert status == 0
    assert stored["format"] == "normnorm-per"
    ways = {row["way"] for row in stored["rows"]}
    assert {"definition", "plain blocks", "products"} <= ways
    assert "| 20 x 3 | 1 | definition |" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["per"], indirect=True)
def test_a_file_that_cannot_be_written_gets_a_sentence(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "SHAPES", ((20, 3),))
    status, stored = run(monkeypatch, script, tmp_path / "no/p.json", "--budget", "0.001")
    assert (status, stored) == (2, None)
    assert "no/p.json" in capsys.readouterr().err


def test_measuring_and_writing_need_no_msgspec(tmp_path):
    program = f"""
        import sys
        sys.modules.update(dict.fromkeys(("msgspec", "tqdm")))
        sys.path[:0] = [{str(SCRIPTS)!r}, {str(SCRIPTS.parent)!r}]
        import fused, gpu_bench
        from speed import environment, results
        device = gpu_bench.torch.device("cpu")
        found = results.Results(environment=environment.before(device, 0))
        results.save(found, {str(tmp_path / "found.json")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
    assert json.loads((tmp_path / "found.json").read_text())["format"] == "normnorm-bench"

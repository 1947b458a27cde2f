"""The scripts for one question, on tensors as small as they can be: what they store and print."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import fused
import per
import torch

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def run(monkeypatch, module, output):
    words = ["--budget", "0.001", "--threads", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words])
    return module.main()


def test_what_fusing_saves_is_stored_and_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fused, "IMAGES", ((2, 3, 4, 5),))
    monkeypatch.setattr(fused, "TOKENS", ((3, 8),))
    assert run(monkeypatch, fused, tmp_path / "f.json") == 0
    stored = json.loads((tmp_path / "f.json").read_text())
    assert stored["format"] == "normnorm-fused"
    assert stored["environment"]["torch"] == torch.__version__
    assert len(stored["rows"]) == 3 * (1 + 2 * 2)
    kept = {(r["what"], r["way"]): r["kept_bytes"] for r in stored["rows"]}
    # The activation's output is kept either way; of a sum and its parts the sum alone.
    assert kept["relu", "fused"] == kept["relu", "in steps"]
    assert kept["residual stream", "fused"] == kept["residual stream", "in steps"]
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| r")]) == 5


def test_what_the_projected_error_costs_is_stored_and_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(per, "SHAPES", ((20, 3),))
    assert run(monkeypatch, per, tmp_path / "p.json") == 0
    stored = json.loads((tmp_path / "p.json").read_text())
    assert stored["format"] == "normnorm-per"
    ways = {row["way"] for row in stored["rows"]}
    assert {"definition", "plain blocks", "products"} <= ways
    assert "| 20 x 3 | 1 | definition |" in capsys.readouterr().out
    assert run(monkeypatch, per, tmp_path / "no/p.json") == 2
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

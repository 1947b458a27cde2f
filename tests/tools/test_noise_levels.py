"""benchmarks/noise_levels.py: what it stores, and the guide's table of it."""

import dataclasses
import itertools
import json
import re
import statistics
import sys
from pathlib import Path

import noise_levels

ROOT = Path(__file__).parents[2]


def test_a_networks_rows_are_added_to_those_of_others(monkeypatch, tmp_path, capsys):
    layers = noise_levels.NETWORKS["MLP, 2 layer norms"]
    one = dataclasses.replace(layers, epochs=1, seeds=1, levels=(1.0, 0.0), tuned=True)
    monkeypatch.setattr(noise_levels, "NETWORKS", {"one": one, "other": one})
    output = tmp_path / "n.json"
    for name in ("one", "other"):
        words = ["--networks", name, "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["noise_levels.py", *words])
        assert noise_levels.main() == 0
    rows = json.loads(output.read_text())["rows"]
    runs = [(row["network"], row["start"], row["schedule"], row["noise_train"]) for row in rows]
    assert runs == [
        (name, *run)
        for name in ("one", "other")
        for run in (
            ("scratch", "constant", None), ("scratch", "constant", 1.0),
            ("scratch", "constant", 0.0), ("scratch", "falling", 1.0), ("scratch", "rising", 1.0),
            ("trained", "constant", None), ("trained", "constant", 1.0),
            ("trained", "constant", 0.0),
        )
    ]  # fmt: skip
    assert all(row["norms"] == 2 and 0 <= row["accuracy"] <= 100 for row in rows)
    plain = rows[0]["accuracy"]
    assert [row["accuracy_before"] for row in rows[5:8]] == [plain] * 3
    assert rows[4]["loss"] < rows[1]["loss"]  # noise that rises from 0 is less than all of it
    assert "| other | scratch | constant | plain: " in capsys.readouterr().out


def test_the_guides_table_of_noise_levels_is_the_stored_one():
    """Every mean over seeds of docs/use/noise.md, in the order of the script's networks."""
    stored = json.loads((ROOT / "benchmarks/results/noise_levels_cpu.json").read_text())["rows"]
    page = (ROOT / "docs/use/noise.md").read_text()
    lines = page[page.index("| network | plain norms |") :].splitlines()[2:]
    shown = {}
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines):
        network, plain, default, less, _ = (cell.strip() for cell in line.strip("|").split("|"))
        found = re.findall(r"([\d.]+): ([\d.]+)", f"{default}; {less}")
        shown[network] = {None: float(plain), **{float(n): float(a) for n, a in found}}
    order = (0, 1, 4, 2, 3, 5, 6)  # of the page's lines among the script's networks
    assert len(shown) == len(order) == len(noise_levels.NETWORKS)
    for position, means in zip(order, shown.values(), strict=True):
        name = list(noise_levels.NETWORKS)[position]
        for noise, shown_mean in means.items():
            accuracies = [
                row["accuracy"] for row in stored
                if (row["network"], row["noise_train"]) == (name, noise)
                and (row["start"], row["schedule"]) == ("scratch", "constant")
            ]  # fmt: skip
            assert len(accuracies) == noise_levels.NETWORKS[name].seeds, (name, noise)
            assert abs(statistics.mean(accuracies) - shown_mean) < 0.051, (name, noise)

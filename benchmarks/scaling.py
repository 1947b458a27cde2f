"""How cost grows: against elements, groups, group size and threads, and between processes.

    python benchmarks/scaling.py [--quick] [--output FILE]

Layers on this machine's CPU by ``normnorm.bench.scaling``, a ResNet-50 step's messages between 2
and 4 gloo processes by ``normnorm.bench.gloo``. ``normnorm report`` draws what it writes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from normnorm.bench import distributed_model, environment, gloo, scaling
from normnorm.bench.providers import PROVIDERS
from normnorm.bench.report.growth import exponent
from normnorm.bench.results import ResultsError

OUTPUT = Path(__file__).resolve().parent / "results" / "scaling_cpu.json"
PROCESSES = (2, 4)


def messages(rounds: int) -> list[gloo.CollectiveCheck]:
    network = distributed_model.resnet(50)
    sequences = {
        f"statistics of {network.name}": distributed_model.statistics_messages(network),
        f"gradients of {network.name}": distributed_model.gradient_messages(network),
    }
    return [check for n in PROCESSES for check in gloo.check(n, sequences, rounds)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller inputs, less time")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    torch.set_num_threads(1)  # but for the sweeps over threads
    study = scaling.Scaling(environment=environment.before(device, scaling.SEED))
    wanted = ("normnorm-cpu", "torch")
    providers = [name for name in wanted if PROVIDERS[name].missing(device) is None]
    plans = list(scaling.plans(1 << (18 if arguments.quick else 23)))
    with tqdm(total=len(plans) + 1, unit="sweep", disable=None) as bar:
        for plan in plans:
            bar.set_postfix_str(f"against {plan.against}")
            budget = 1.0 if arguments.quick else 20.0
            study.sweeps += scaling.sweep(plan, providers, budget_s=budget)
            bar.update()
        bar.set_postfix_str("messages")
        study.collectives = messages(3 if arguments.quick else 15)
        bar.update()
        seconds = bar.format_dict["elapsed"]
    study.environment = environment.after(study.environment, device, seconds)
    try:
        scaling.save(study, arguments.output)
    except ResultsError as error:
        print(f"benchmarks/scaling.py: {error}", file=sys.stderr)
        return 2
    for sweep in study.sweeps:
        print(f"{sweep.layer:18} {sweep.provider:13} {sweep.against:11} {exponent(sweep.fit)}")
    for check in study.collectives:
        words = f"{check.what}, {check.processes} processes"
        print(f"{words}: prediction off by {100 * check.error:+.0f} %")
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

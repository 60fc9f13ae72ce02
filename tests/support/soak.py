"""Soak test, run by hand: many mixed cases through the commands, and a pipeline killed at many moments.

    python tests/support/soak.py cases|faults|all [--count N] [--seed S] [--folder DIR]

It takes an hour or two and continues where it stopped. Exit status 1 when anything was found. Linux only.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import soak_cases
import soak_faults
from soak_runs import ROOT

PARTS: dict[str, tuple[Callable[..., bool], int]] = {  # and how many by default
    "cases": (soak_cases.soak, 200),
    "faults": (soak_faults.sweep, 30),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the requested parts, one after the other."""
    parser = argparse.ArgumentParser(prog="python tests/support/soak.py", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--count", type=int, help="; ".join(f"{n} {part}" for part, (_, n) in PARTS.items()))
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and of the mixture (default: 0)")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "soak", help="(default: outputs/soak)")
    options = parser.parse_args(arguments)
    folder, started = options.folder.resolve(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for part in PARTS if options.part == "all" else [options.part]:
        do, count = PARTS[part]
        print(f"---- {part}", flush=True)
        if not do(folder, options.count or count, options.seed, lambda line: print(line, flush=True)):
            found.append(part)
    minutes = (time.monotonic() - started) / 60
    print(f"{f'FOUND something in {found}' if found else 'all well'}, after {minutes:.0f} min")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

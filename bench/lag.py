"""Learning curves with sampling and learning in turns, and with the next step sampled meanwhile, on the toy world.

    python -m bench.lag runs/quickstart runs/lag [--seeds N] [NAME ...]

Runs algorithms as ``bench.algorithms`` does, with ``max_policy_lag`` 0 and 1; what is done is not done again. Prints a
Markdown table of the gold score of what was sampled, over 20 steps each, and at the end on held-out prompts: mean and
range over the seeds. Then how far the two end apart.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean, variance

from bench.algorithms import run

ALGORITHMS, LAGS = ("ppo", "grpo"), (0, 1)
WINDOWS = ((1, 20), (21, 40), (41, 60))
"""First and last step of what is averaged."""

NOISE = 2.0
"""Standard errors by which the means of equal runs may differ."""


def main() -> int:
    """Run and print; 1 if an algorithm ends lower with the larger lag by more than the noise of its seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of bench.algorithms ({' '.join(ALGORITHMS)})")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (3)")
    given = parser.parse_args()
    columns = [*(f"steps {first} to {last}" for first, last in WINDOWS), "held out, at the end", "seconds a step"]
    rows = ["| " + " | ".join(["algorithm", "lag", *columns]) + " |", "|---|" + "---:|" * (1 + len(columns))]
    notes, lower = [], False
    for name in given.names or ALGORITHMS:
        ends = []
        for lag in LAGS:
            folders = {seed: given.target / f"{name}-lag{lag}-{seed}" for seed in range(given.seeds)}
            runs = [
                run(name, given.source, folder, f"max_policy_lag={lag}", f"seed={seed}")
                for seed, folder in folders.items()
            ]
            scores = [
                [fmean(event["reward/gold/mean"] for event in events[first : last + 1]) for events in runs]
                for first, last in WINDOWS
            ]
            ends.append([events[-1]["eval/gold"] for events in runs])
            shown = [f"{fmean(at):.2f} ({min(at):.2f} to {max(at):.2f})" for at in (*scores, ends[-1])]
            seconds = fmean(event["time/step"] for events in runs for event in events[1:])
            rows.append("| " + " | ".join([name, str(lag), *shown, f"{seconds:.2f}"]) + " |")
        apart = fmean(ends[1]) - fmean(ends[0])
        note = f"{name}: with lag {LAGS[1]} it ends {apart:+.3f} from lag {LAGS[0]}, held out"
        if given.seeds > 1:
            error = (sum(map(variance, ends)) / given.seeds) ** 0.5
            note += f"; standard error {error:.3f}"
            lower |= apart < -NOISE * error
        notes.append(f"{note}.")
    print("\n".join([*rows, "", *notes]))
    return int(lower)


if __name__ == "__main__":
    sys.exit(main())

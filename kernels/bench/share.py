"""The share f of prompts that a joint run's steps kept, over the run, as a PNG.

python kernels/bench/share.py docs/results/kernels-f.png "skip_below 2^-12=runs/a/log.jsonl" ...
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main(out: str, *named: str) -> None:
    """One line a log, `label=log.jsonl`."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name in named:
        label, _, path = name.partition("=")
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        axes.plot([json.loads(line)["kept_prompts"] for line in lines], label=label, linewidth=1)
    axes.set(xlabel="step", ylabel="f, share of prompts kept", ylim=(0, 1))
    axes.legend(frameon=False)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in named for named in sys.argv[2:]):
        sys.exit("share.py: OUT.png and at least one LABEL=LOG.jsonl are needed")
    main(*sys.argv[1:])

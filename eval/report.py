"""What an evaluation wrote -> its report again: report.html, report.md, report.tex and plots/.

    rag2 eval report -c configs/demo/report.yaml results=runs/demo
    rag2 eval report results=runs/compare kb=runs/home/data/kb.sqlite logs=runs/home

Nothing is computed anew: the numbers are those of results.json, which is only read.
"""

from pathlib import Path

from rich.console import Console

from rag2 import config
from rag2.evaluation import files, report
from rag2.registry import UserError


class ReportConfig(config.Config):
    """The report of an evaluation, written again from its files."""

    results: str = "runs/compare"
    """directory with results.json and samples_<arm>.jsonl; the report goes there"""
    kb: str | None = None
    """knowledge base with the passages; null: data/kb.sqlite in `results`, if it is there"""
    logs: str | None = None
    """directory with a folder for each training stage; null: `results`"""


def main(cfg: ReportConfig) -> None:
    """Write the report's files beside results.json."""
    directory = Path(cfg.results)
    results = files.read_results(directory)
    if cfg.logs is not None and not Path(cfg.logs).is_dir():
        raise UserError(f"logs={cfg.logs!r} is not a directory")
    samples = files.read_samples(directory, results["arms"])
    kb = Path(cfg.kb) if cfg.kb else directory / "data" / "kb.sqlite"
    passages = files.read_passages(kb, samples) if cfg.kb or kb.is_file() else {}
    logs = files.read_logs(Path(cfg.logs) if cfg.logs else directory)
    report.render(directory, results, samples, passages, logs)
    Console().print(f"wrote {directory / 'report.html'}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    config.run(main, ReportConfig)

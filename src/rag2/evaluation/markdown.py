"""Numbers of results.json -> report.md."""

from rag2.evaluation.columns import Table
from rag2.evaluation.sections import sections
from rag2.evaluation.verdict import Results, verdict


def markdown(results: Results) -> str:
    """The report as Markdown: the verdict, then every section."""
    seeds = " + ".join(results.get("seeds", [str(results["seed"])]))
    blocks = [
        f"# Evaluation on {results['task']}",
        f"{results['n']} test questions, seed {seeds}. **{verdict(results)}**",
    ]
    for section in sections(results):
        blocks.append(f"## {section.title}")
        blocks.extend(_table(part) if isinstance(part, Table) else part for part in section.parts)
    return "\n\n".join(blocks) + "\n"


def _table(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """A bar or a line break inside a cell would end it."""
    return " ".join(text.replace("|", "\\|").split())

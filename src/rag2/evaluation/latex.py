"""Numbers of results.json -> report.tex, the table of arms for a paper."""

import re

from rag2.evaluation.columns import ARMS, COST, cell, table_of_arms
from rag2.evaluation.contrasts import CONTROLS
from rag2.evaluation.verdict import Results, interval, verdict

COLUMNS = [column for column in ARMS if column.key in ("k", "recall_at_1")]
ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
} | {sign: rf"\{sign}" for sign in "&%$#_{}"}


def latex(results: Results) -> str:
    r"""Tables for \usepackage{booktabs}: accuracy with interval, K, recall@1; what each arm cost.

    The best arm is in bold.
    """
    arms = results["arms"]
    best = max(
        (arm["accuracy"] for name, arm in arms.items() if name not in CONTROLS), default=None
    )
    lines = []
    for name, arm in arms.items():
        accuracy = f"{100 * arm['accuracy']:.1f}"
        if arm["accuracy"] == best and name not in CONTROLS:
            accuracy = rf"\textbf{{{accuracy}}}"
        shown = [cell(arm, column).removesuffix(" %") for column in COLUMNS]
        words = (escaped(name), f"{accuracy} {interval(arm['ci95'])}", *map(_dash, shown))
        lines.append(f"{' & '.join(words)} \\\\")
    rows = "\n".join(lines)
    return rf"""% needs \usepackage{{booktabs}}
\begin{{table}}
\centering
\caption{{Accuracy on {escaped(str(results["task"]))}, {results["n"]} questions, in percent with
95\,\% intervals (Wilson). {escaped(verdict(results))}}}
\begin{{tabular}}{{lrrr}}
\toprule
Arm & Accuracy & $K$ & Recall@1 \\
\midrule
{rows}
\bottomrule
\end{{tabular}}
\end{{table}}
{_costs(results)}"""


def _costs(results: Results) -> str:
    """What each arm cost, its columns those that any arm has a number for."""
    table = table_of_arms(results, COST)
    words = [[*map(_dash, map(escaped, row))] for row in (table.header, *table.rows)]
    head, *rows = (f"{' & '.join(row)} \\\\" for row in words)
    body = "\n".join(rows)
    return rf"""\begin{{table}}
\centering
\caption{{Cost of each arm.}}
\footnotesize
\begin{{tabular}}{{l{"r" * (len(table.header) - 1)}}}
\toprule
{head}
\midrule
{body}
\bottomrule
\end{{tabular}}
\end{{table}}
"""


def escaped(text: str) -> str:
    """Text as TeX prints it, on one line."""
    signs = "|".join(map(re.escape, ESCAPES))
    return re.sub(signs, lambda found: ESCAPES[found[0]], " ".join(text.split()))


def _dash(text: str) -> str:
    return "--" if text == "-" else text

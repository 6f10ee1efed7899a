"""The tables of methods and options as Markdown: ``python -m flashode.tables README.md`` writes them there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from .methods import METHODS, Method
from .methods.options import OPTIONS

_KINDS = {"adaptive": "adaptive", "fixed": "fixed steps"}


def methods_table() -> str:
    methods = sorted(METHODS.values(), key=lambda m: (m.name != "dopri5", not m.adaptive, -m.order))
    rows = [
        ("name", "order", "steps", "calls of the field", "between steps", "source"),
        *(
            (
                f"`{m.name}`" + (" (default)" if m.name == "dopri5" else ""),
                "SciPy's" if m.family == "scipy" else str(m.order),
                ("adaptive" if m.adaptive else "fixed")
                + (", implicit" if m.family == "implicit" or m.corrects else "")
                + (", of pairs (q, p)" if m.family == "symplectic" else ""),
                _calls(m),
                _between(m),
                m.source,
            )
            for m in methods
        ),
    ]
    return _markdown(rows)


def _calls(method: Method) -> str:
    if method.family == "scipy":
        return "SciPy's"
    if method.family == "adams":
        return "1" + (", and 1 a correction" if method.corrects else "") + "; 4 in the first steps"
    if method.family == "symplectic":
        return "2; 3 in the first step"
    stages, extra = method.tableau.stages, len(method.dense.extra_c)
    if method.family == "implicit":
        solved = stages - method.tableau.begins_with_f0
        return f"{solved} an iteration of Newton's method"
    if not method.adaptive:
        return str(stages)
    return f"{stages - 1}" + (f", and {extra} more in a step with outputs inside" if extra else "")


def _between(method: Method) -> str:
    if method.family == "scipy":
        return "SciPy's"
    return f"order {method.dense.order}" if method.adaptive else 'linear, or `interp="cubic"`'


def options_table() -> str:
    rows = [("option", "for", "meaning")]
    for name, option in OPTIONS.items():
        kinds = [_KINDS.get(group, group) for group in option.groups]
        rows.append((f"`{name}`", ", ".join(kinds), option.meaning))
    return _markdown(rows)


def _markdown(rows) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def written_into(text: str) -> str:
    """A document with its tables made anew, each between a pair of comments that name it."""
    for name, table in (("methods", methods_table()), ("options", options_table())):
        begin, end = f"<!-- {name}: python -m flashode.tables README.md -->", f"<!-- end of {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        if len(re.findall(pattern, text, re.S)) != 1:
            raise ValueError(f"the document must hold one pair of {begin!r} and {end!r}")
        text = re.sub(pattern, lambda _: f"{begin}\n{table}\n{end}", text, flags=re.S)
    return text


def main(paths):
    for path in map(Path, paths):
        path.write_text(written_into(path.read_text()))
    if not paths:
        print(methods_table(), options_table(), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])

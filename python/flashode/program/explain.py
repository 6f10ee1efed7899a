"""What a field was compiled to, for people."""

from __future__ import annotations

from collections import Counter

from .assemble import Program
from .ir import Form, Kind

_OFTEN = {
    Kind.PREPARED: "once a solve",
    Kind.UNIFORM: "once an evaluation",
    Kind.LANES: "for every sample",
    Kind.SUM: "over all samples",
}


def explain(field) -> str:
    """The text of `CompiledField.explain`."""
    held = [(program, captured) for programs in field._programs.values() for program, captured in programs]
    if not held:
        return f"{field!r}: nothing is compiled yet; it is at the first solve"
    return "\n\n".join(
        [f"{field!r}: {len(held)} program{'s' * (len(held) > 1)}", *(_program(*pair) for pair in held)]
    )


def _program(program: Program, captured) -> str:
    layout, form = program.layout, program.form
    samples = {"rows": "the first axis", "columns": "the last axis"}.get(layout.kind)
    shapes = ", ".join(str(tuple(s)) for s in layout.shapes)
    backward = program.backward is not None
    flops = form.flops
    lines = [
        f"{program.method} for a state of {shapes}, {str(program.dtype).removeprefix('torch.')}"
        + {None: "", "reverse": ", with the way back through its steps", "sweep": ", the continuous adjoint"}[program.backward],
        f"  samples: {layout.samples} along {samples}, {program.lanes} at a time" if samples else "  samples: the whole state is one",
        "  steps: " + ("every sample has its own" if program.own_clocks else "shared by all samples"),
        f"  flops of a sample: {flops['slope']:,} for a slope" + (f", {flops['pull_back']:,} more to pull back" if backward else ""),
        f"  captured tensors: {len(program.shapes)}" + (f", of shapes {', '.join(map(str, program.shapes))}" if program.shapes else ""),
        f"  source: {program.library.source}",
        "  made in " + ", ".join(f"{1e3 * s:.0f} ms ({what})" for what, s in program.seconds.items())
        + ("; the library was there" if program.library.cached else ""),
    ]  # fmt: skip
    if captured.fixed:
        lines.append(f"  found nowhere, so taken as they are for good: captured tensors {captured.fixed}")
    for entry, (count, seconds) in program.spent.items():
        lines.append(f"  {entry}: {count} calls, {1e3 * seconds:.3g} ms")
    return "\n".join([*lines, "  operations:", *_operations(form)])


def _operations(form: Form) -> list[str]:
    """Operations by the line of func that they come from, in order."""
    by_line: dict[tuple[str, Kind, bool], Counter] = {}
    for a in form.arrays:
        if a.operands:
            by_line.setdefault((a.line, a.kind, a.adjoint), Counter())[a.operation] += a.size
    rows = []
    for (line, kind, adjoint), counts in by_line.items():
        what = ", ".join(f"{name} x{size}" for name, size in counts.items())
        rows.append(f"    {line or '(func)'}{' (derivative)' * adjoint}: {what}, {_OFTEN[kind]}")
    return rows

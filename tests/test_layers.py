"""The architecture, checked by reading the source: who may include and import whom."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python/flashode"

# A module imports from modules further up only.
LAYERS = [
    ["errors", "tableau", "control", "extension", "outside", "vjp", "first_only"],
    ["interp", "transforms", "methods/options"],
    ["methods/explicit", "methods/implicit", "methods/adams"],
    ["methods/__init__"],
    ["arguments"],
    ["events"],
    ["options", "progress", "pytrees"],
    ["problem", "held"],
    ["augmented"],
    ["solution"],
    ["engines/element", "engines/clock", "engines/krylov"],
    ["engines/linearised"],
    ["engines/stages"],
    ["batched", "dense", "engines/reference_events"],
    ["program/ir", "program/operations", "program/call", "program/tables", "program/layout", "program/build"],
    ["program/cuda"],
    ["program/samples", "program/loops", "program/recorder", "program/captured"],
    ["program/products"],
    ["program/rules"],
    ["program/lower"],
    ["program/places", "program/trace"],
    ["program/section"],
    ["program/source"],
    ["program/assemble"],
    ["program/explain"],
    ["program/field"],
    ["program/__init__"],
    ["engines/on_device"],
    ["engines/reference", "engines/native"],
    [
        "engines/reference_sweep",
        "engines/traced",
        "engines/adams",
        "engines/leapfrog",
        "engines/scipy_solver",
    ],
    ["engines/reference_batched", "engines/native_batched", "engines/compiled"],
    ["engines/__init__"],
    ["adjoint/spec", "adjoint/schedule", "adjoint/once", "adjoint/apart"],
    ["adjoint/reached"],
    ["adjoint/restart", "adjoint/checkpoint"],
    ["adjoint/backsolve"],
    ["adjoint/__init__"],
    ["event_gradients"],
    ["api"],
    ["gradient_check"],
    ["__init__"],
    ["info", "tables"],
    ["nn/fields", "nn/divergence", "nn/mechanics", "nn/sde"],
    ["nn/block"],
    ["nn/flow", "nn/latent", "nn/resnet"],
    ["nn/__init__"],
    ["datasets/planar", "datasets/motion", "datasets/images"],
    ["datasets/files"],
    ["datasets/__init__"],
]
# Above all of them what finds torchdiffeq, and below them the package that it finds.
LAYERS = [["compat/__init__"], *LAYERS, ["compat/__main__"]]
LAYERS += [
    [f"compat/site/torchdiffeq/{name}" for name in names.split()]
    for names in (
        "_impl/event_handling _impl/interp",
        "_impl/misc",
        "_impl/solvers",
        "_impl/rk_common _impl/fixed_adams _impl/scipy_wrapper",
        "_impl/fixed_grid _impl/dopri5 _impl/dopri8 _impl/tsit5 _impl/bosh3 _impl/adaptive_heun _impl/fehlberg2",
        "_impl/odeint",
        "_impl/adjoint",
        "_impl/__init__",
        "__init__",
    )
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# The twins: the same functions in the same order in Python and C++.
TWINS = {
    "python/flashode/control.py": "csrc/kernels/control.h",
    "python/flashode/engines/reference.py": "csrc/torch/driver.cpp",
    "python/flashode/engines/reference_sweep.py": "csrc/torch/sweep.cpp",
    "python/flashode/engines/reference_batched.py": "csrc/torch/batched.cpp",
}


def sources(*patterns):
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def imports(path):
    """Modules of the package that a module imports, as names in LEVEL."""
    name = path.relative_to(PACKAGE).with_suffix("").as_posix()
    package = name.split("/")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == "flashode"):
            names = (node.module or "").split(".") if node.module else []
            base = package[: len(package) - (node.level - 1)]
            if not node.level:  # from outside the package, as `compat/site` is when it is found
                base, names = [], names[1:]
            target = [*base, *names]
            joined = "/".join(target)
            if joined in LEVEL:
                yield joined
            elif f"{joined}/__init__" in LEVEL and names:
                yield f"{joined}/__init__"
            else:
                found = ("/".join([*base, alias.name]) for alias in node.names)
                public = "/".join([*base, "__init__"])  # has what is no module
                places = ((f"{name}/__init__", name, public) for name in found)
                yield from (next(place for place in each if place in LEVEL) for each in places)


@pytest.mark.parametrize(
    "path", sources("python/flashode/**/*.py"), ids=lambda p: p.relative_to(PACKAGE).as_posix()
)
def test_modules_import_from_above_only(path):
    name = path.relative_to(PACKAGE).with_suffix("").as_posix()
    assert name in LEVEL, f"{name} has no place in the layers"
    for target in imports(path):
        assert LEVEL[target] < LEVEL[name], f"{name} imports {target}"


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


@pytest.mark.parametrize("path", sources("csrc/kernels/*", "csrc/compiled/*"), ids=lambda p: p.name)
def test_kernels_and_programs_know_nothing_of_torch(path):
    for header in includes(path):
        assert not re.match(r"(torch|ATen|c10|pybind11)/|Python\.h", header), header
        assert path.suffix == ".cu" or not header.startswith("cuda"), header


@pytest.mark.parametrize("path", sources("csrc/torch/*"), ids=lambda p: p.name)
def test_bindings_avoid_the_headers_that_make_builds_slow_or_fail(path):
    for header in includes(path):
        assert header not in ("torch/extension.h", "torch/all.h", "ATen/ATen.h"), header
        assert not header.startswith(("c10/cuda", "ATen/cuda", "cuda")), header
        if path.name == "ops.cpp":
            assert not re.match(r"pybind11/|Python\.h|torch/csrc/autograd/python", header), header


def test_coefficients_stand_in_one_place():
    """No other source has a fraction of a tableau, or a number with many digits but the fits of series.h."""
    for path in sources("python/flashode/**/*.py", "csrc/**/*"):
        if path.parent.name == "methods" or path.is_dir() or path.name == "series.h":
            continue
        found = re.findall(r"\b\d{2,}\s*/\s*\d{2,}\b|\b\d\.\d{7,}", path.read_text())
        assert not found, f"{path.name}: {found}"


def python_functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node.lineno, node.name


def names_in_order(path):
    text = path.read_text()
    if path.suffix == ".py":
        return [name for _, name in sorted(python_functions(path))]
    pattern = r"^(?:FLASHODE_HD )?[\w:<>,\s&*]*?\b(?:(?:Run|Sweep)::)?(\w+)\([^;]*?\)(?: const)? \{"
    return re.findall(pattern, text, re.M)


@pytest.mark.parametrize("python, cpp", TWINS.items(), ids=lambda p: Path(p).name)
def test_twins_have_the_same_functions_in_the_same_order(python, cpp):
    ours, theirs = names_in_order(ROOT / python), names_in_order(ROOT / cpp)
    shared = [name for name in ours if name in theirs]
    expected = {
        "control.py": {"first_guess", "initial_step", "accept", "next_step", "remember", "clamp_step"},
        "reference.py": {"outcome", "error_norm", "first_step", "rk_step", "landing",
                         "adaptive_step", "fixed_step", "interpolate", "emit"},
        "reference_sweep.py": {"outcome", "evaluate", "error_norm", "first_step", "begin", "adj_with", "rk_step",
                               "landing", "cancel", "adaptive_step", "jumps_in", "fixed_step", "pull_back",
                               "states_at", "arrive", "distance"},
        "reference_batched.py": {"outcome", "call", "first_step", "begin_trials", "rk_step", "judge", "extend", "commit",
                                 "set_aside", "compact"},
    }[Path(python).name]  # fmt: skip
    assert expected <= set(shared)
    in_order = [name for name in ours if name in expected and name not in ("solve", "clamp_step")]
    order = [theirs.index(name) for name in in_order]
    assert order == sorted(order), [theirs[i] for i in sorted(order)]


@pytest.mark.parametrize(
    "path",
    sources("python/flashode/**/*.py", "csrc/**/*.*", "tests/*.py", "bench/*.py", "examples/*.py"),
    ids=lambda p: p.name,
)
def test_a_source_file_opens_with_a_sentence(path):
    first = path.read_text().lstrip()
    assert first.startswith(('"""', "// ", "#!")), path.name
    if first.startswith("#!"):
        assert first.splitlines()[1].startswith(('"""', "# ")), path.name


def test_no_user_error_is_an_assert():
    for path in sources("python/flashode/**/*.py"):
        found = [n.lineno for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
        assert not found, f"{path.name}: {found}"


def test_examples_and_benchmarks_use_public_names_only():
    for path in sources("examples/*.py", "bench/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flashode"):
                assert node.module in ("flashode", "flashode.nn", "flashode.datasets"), (
                    f"{path.name} imports {node.module}"
                )
            if isinstance(node, ast.Import):
                for alias in node.names:
                    assert not alias.name.startswith("flashode."), f"{path.name} imports {alias.name}"

"""`import torchdiffeq` gives flashode, for programs and packages that cannot be edited.

Three ways in, for one process:

- ``python -m flashode.compat script.py args…``, also ``-m module`` and ``-c code``: nothing is edited, and
  the processes that the program starts follow suit;
- `install` before anything imports torchdiffeq, and `uninstall`;
- ``PYTHONPATH`` beginning with `SITE`, for launchers that start Python themselves.

The package that is found has torchdiffeq's public names and the private ones that public code imports: the
table of solvers, their base classes and their tableaus. Its sources are in ``site/torchdiffeq``.
``torchdiffeq.__flashode__`` is the version of flashode, and tells who serves. ``torchdiffeq.__version__`` is
"0.2.5", the release it stands in for, because programs compare it; what
``importlib.metadata.version("torchdiffeq")`` says of the installed distribution, if there is one, stays.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

SITE = str(Path(__file__).parent / "site")

_replaced: dict[str, object] = {}


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        # An empty path makes `from module import name` ask the finder for a name that is missing, which can
        # then say what there is; getattr and hasattr are left alone.
        module.__dict__.setdefault("__path__", [])


class _Finder:
    """Finds torchdiffeq and its submodules in `SITE`, before any other finder is asked."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if not _is_torchdiffeq(name):
            return None
        place = Path(SITE, *name.split("."))
        if (place / "__init__.py").exists():
            file, inside = place / "__init__.py", [str(place)]
        elif place.with_suffix(".py").exists():
            file, inside = place.with_suffix(".py"), None
        else:
            raise _missing(name)
        return importlib.util.spec_from_file_location(
            name, file, loader=_Loader(name, str(file)), submodule_search_locations=inside
        )


def _missing(name) -> ModuleNotFoundError:
    parent, _, last = name.rpartition(".")
    module = sys.modules.get(parent)
    names = set()
    if module is not None:
        names = {
            key for key, value in vars(module).items() if key[:2] != "__" and _is_torchdiffeq(_origin(value))
        }
        names |= {path.stem for folder in module.__path__ for path in Path(folder).glob("[!_]*")}
    # Under its own name the import system would take the error for "no such submodule" and drop the message.
    return ModuleNotFoundError(
        f"flashode serves torchdiffeq here, and its {parent} has no {last!r}; it has {', '.join(sorted(names))}. "
        "flashode.compat.uninstall() gives torchdiffeq itself",
        name=parent,
    )


def _origin(value) -> str:
    """The module that a function, a class or a module is of; torchdiffeq's own for any other value."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    return (callable(value) and getattr(value, "__module__", None)) or "torchdiffeq"


def _is_torchdiffeq(name) -> bool:
    return name == "torchdiffeq" or name.startswith("torchdiffeq.")


def _is_ours(module) -> bool:
    return str(getattr(module, "__file__", None)).startswith(SITE)


def install():
    """Makes every later ``import torchdiffeq`` give flashode; of no effect where it does already.

    Modules that hold torchdiffeq, or functions of it, keep what they hold: call this first. A torchdiffeq that
    was imported is kept, and `uninstall` gives it back.

    Example:
        >>> from flashode import compat
        >>> compat.install()
        >>> from torchdiffeq import odeint_adjoint as odeint
        >>> compat.uninstall()
    """
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
    for name in [name for name in sys.modules if _is_torchdiffeq(name)]:
        if not _is_ours(sys.modules[name]):
            _replaced[name] = sys.modules.pop(name)


def uninstall():
    """Undoes `install`: later imports of torchdiffeq give what they gave before."""
    if _Finder in sys.meta_path:
        sys.meta_path.remove(_Finder)
    for name in [name for name in sys.modules if _is_torchdiffeq(name)]:
        if _is_ours(sys.modules[name]):
            del sys.modules[name]
    sys.modules.update(_replaced)
    _replaced.clear()

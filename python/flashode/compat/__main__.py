"""``python -m flashode.compat script.py args…`` runs a program with flashode in the place of torchdiffeq."""

from __future__ import annotations

import os
import runpy
import sys
import types

from flashode.compat import SITE, install

USAGE = "usage: python -m flashode.compat (script.py | -m module | -c code) [args…]"


def main(arguments):
    if (
        not arguments
        or arguments[0] in ("-h", "--help")
        or (arguments[0] in ("-m", "-c") and not arguments[1:])
    ):
        print(USAGE, file=sys.stdout if arguments[:1] in (["-h"], ["--help"]) else sys.stderr)
        sys.exit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)
    install()
    # Processes that the program starts: Python's own read the variable, those of multiprocessing are given
    # this one's sys.path.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [SITE, os.environ.get("PYTHONPATH")]))
    sys.path.insert(1, SITE)
    what, *rest = arguments
    if what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *rest[1:]]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(module))
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(what))
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

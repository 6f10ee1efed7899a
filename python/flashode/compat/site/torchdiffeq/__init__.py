"""torchdiffeq's public names, served by flashode."""

import flashode
from flashode.compat import install as _install

from ._impl import odeint, odeint_adjoint, odeint_dense, odeint_event

# Programs compare it with the releases whose signatures they know; this is the one served here.
__version__ = "0.2.5"
__flashode__ = flashode.__version__

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]

_install()  # for a process that came here by its search path

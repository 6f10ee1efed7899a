"""Programs: fields traced, written as C++, compiled, and called with a whole solve."""

from . import cuda as cuda
from .assemble import NO_GRADIENTS as NO_GRADIENTS
from .assemble import Program as Program
from .assemble import example as example
from .field import CompiledField as CompiledField
from .field import apart_from_autocast as apart_from_autocast
from .field import compile as compile

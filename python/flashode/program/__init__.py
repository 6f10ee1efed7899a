"""Programs: fields traced, written as C++, compiled, and called with a whole solve."""

from .assemble import Program as Program
from .assemble import example as example
from .field import CompiledField as CompiledField
from .field import compile as compile

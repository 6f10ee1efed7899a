"""Operations of ATen written into a graph while they are done, and refused where a graph cannot hold them."""

from __future__ import annotations

import linecache
import operator
import os
import sys

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CompileError
from .operations import DECOMPOSITIONS, POINTWISE, SHAPES

aten = torch.ops.aten
Tensor = torch.Tensor

# What is generated as it is, is not taken apart.
_TAKEN_APART = {
    op: by
    for op, by in DECOMPOSITIONS.items()
    if op._schema.name.removeprefix("aten::") not in SHAPES | POINTWISE.keys()
}
# Ways to the numbers of a tensor that pass ATen by.
_READERS = {
    getattr(Tensor, name): f".{name}()"
    for name in ("numpy", "tolist", "__array__", "data_ptr", "untyped_storage", "__dlpack__")
    if hasattr(Tensor, name)
}
_PLAIN = (Tensor, torch.nn.Parameter)
_SKIPPED = tuple(
    os.path.dirname(os.path.abspath(path)) + os.sep for path in (torch.__file__, os.path.dirname(__file__))
)
_BRANCH = "write a choice between values with torch.where, or solve without flashode.compile"
_FOLLOW = "use the tensor itself in its place, or keep the number in a Python variable"


class Recorder(TorchDispatchMode):
    """Writes operations into a graph, while they are done."""

    def __init__(self):
        super().__init__()
        self.outermost = sys._getframe(1).f_code
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}  # by the id of a tensor
        self.alive: list[Tensor] = []  # so that ids stay theirs
        self.leaves: dict[fx.Node, Tensor] = {}  # that func has from elsewhere, or makes of numbers
        self.known: set[fx.Node] = set()  # follow from nothing that may change
        self.not_ours: set[int] = set()  # storages that func must not write to
        self.lines: dict[fx.Node, str] = {}
        self.line_of_number: dict[int, str] = {}  # by autograd's number of the node that was made there
        self.writes = False

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # it would import TorchDynamo, for more than a second

    def placeholder(self, name, x: Tensor):
        self.set_node(x, self.graph.placeholder(name))
        self.not_ours.add(x.untyped_storage()._cdata)

    def leaf(self, x: Tensor, known=False) -> fx.Node:
        """The node of a tensor that no operation recorded here has made."""
        node = self.graph.create_node("get_attr", f"leaf{len(self.leaves)}")
        self.lines[node] = self.line()
        self.leaves[node] = x
        if known:
            self.known.add(node)
        else:
            self.not_ours.add(x.untyped_storage()._cdata)
        self.set_node(x, node)
        return node

    def set_node(self, x: Tensor, node: fx.Node):
        self.nodes[id(x)] = node
        self.alive.append(x)

    def node_of(self, x: Tensor) -> fx.Node:
        return self.nodes.get(id(x)) or self.leaf(x)

    def line(self) -> str:
        """The line of the user's code that is at work, the innermost."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not self.outermost:
            file = frame.f_code.co_filename
            if not file.startswith(_SKIPPED):
                source = linecache.getline(file, frame.f_lineno, frame.f_globals).strip()
                return f"{os.path.basename(file)}:{frame.f_lineno}" + (source and f": {source}")
            frame = frame.f_back
        differentiated = torch._C._current_autograd_node()
        if differentiated is not None:
            return self.line_of_number.get(differentiated._sequence_nr(), "the derivative of func")
        return ""

    def refusal(self, what, remedy) -> CompileError:
        line = self.line()
        return CompileError(f"func cannot be compiled: {what}{f', at {line}' * bool(line)}; {remedy}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch._C._current_autograd_node() is None:
            # The node of autograd is made before the operation comes here.
            self.line_of_number.setdefault(torch._C._autograd._get_sequence_nr() - 1, self.line())
        if func is aten.lift_fresh.default:  # torch.tensor of numbers
            self.leaf(args[0], known=True)
            func = aten.lift_fresh_copy.default
        elif func in _TAKEN_APART or func._can_decompose():
            with self:
                result = (_TAKEN_APART.get(func) or func.decompose)(*args, **kwargs)
            if result is not NotImplemented:
                return result
        operands = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in operands:
            self.require_plain(x)
        nodes = [self.node_of(x) for x in operands]
        known = self.known.issuperset(nodes)
        self.require_traceable(func, operands, known)
        if torch.Tag.data_dependent_output in func.tags:
            return func(*args, **kwargs)
        self.require_own(func, args, kwargs)
        node = self.graph.call_function(func, *mapped((args, kwargs), self.node_of))
        self.lines[node] = self.line()
        if known:
            self.known.add(node)
        result = func(*args, **kwargs)
        self.keep(result, node)
        return result

    def keep(self, result, node):
        if isinstance(result, Tensor):
            self.require_dense_real(result)
            self.set_node(result, node)
            node.meta["shape"] = result.shape
        elif isinstance(result, (list, tuple)):
            for i, x in enumerate(result):
                if x is not None:
                    part = self.graph.call_function(operator.getitem, (node, i))
                    self.lines[part] = self.lines[node]
                    if node in self.known:
                        self.known.add(part)
                    self.keep(x, part)

    # ---- what a graph cannot hold

    def require_plain(self, x: Tensor):
        if id(x) in self.nodes:
            return
        if type(x) not in _PLAIN:
            raise self.refusal(
                f"it uses a Tensor subclass, {type(x).__name__}", "give it as_subclass(torch.Tensor)"
            )
        self.require_dense_real(x)
        if x.device.type == "meta" or isinstance(x, torch._subclasses.FakeTensor):
            raise self.refusal("it uses a Tensor without values", "give it a real one")

    def require_dense_real(self, x: Tensor):
        if x.layout != torch.strided or x.is_nested or x.is_quantized:
            raise self.refusal(
                "it uses a Tensor that is sparse, nested or quantized", "use a dense one, see .to_dense()"
            )
        if x.is_complex():
            raise self.refusal("it uses complex numbers", "keep real and imaginary parts apart")

    def require_traceable(self, func, operands, known):
        name = func._schema.name
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self.refusal(
                f"{name} draws random numbers",
                "draw them before the solve and let func read them; of Dropout call .eval()",
            )
        if known:
            return
        masks = any(x.dtype in (torch.bool, torch.uint8) for x in operands[1:])
        if torch.Tag.data_dependent_output in func.tags:
            if any(self.follows_from_call(x) for x in operands):
                raise self.refusal(
                    f"what it does depends on a number that it computes ({name}: if, bool(), float(), item())",
                    _BRANCH,
                )
            raise self.refusal(f"it reads a number of a captured tensor ({name})", _FOLLOW)
        if torch.Tag.dynamic_output_shape in func.tags and (masks or func is not aten.index.Tensor):
            raise self.refusal(f"the shape of what {name} gives depends on values", _BRANCH)

    def follows_from_call(self, x: Tensor) -> bool:
        """Whether a tensor comes from t or y, and not from captured ones alone."""
        stack, seen = [self.node_of(x)], set()
        while stack:
            node = stack.pop()
            if node.op == "placeholder" and node.target in ("t", "y", "adj"):
                return True
            if node not in seen:
                seen.add(node)
                stack += node.all_input_nodes
        return False

    def require_own(self, func, args, kwargs):
        """Refuses to write to what is not a tensor of func's own."""
        if not func._schema.is_mutable:
            return
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for x in leaves(args[i] if i < len(args) else kwargs.get(argument.name)):
                if isinstance(x, Tensor) and x.untyped_storage()._cdata in self.not_ours:
                    raise self.refusal(
                        f"{func._schema.name} writes to a tensor that it was given or captured",
                        "make a new one, as x = x + 1 in place of x += 1",
                    )
        self.writes = True


class Readers(TorchFunctionMode):
    """Refuses what reads numbers past ATen, and puts replacements in the place of captured tensors."""

    def __init__(self, recorder: Recorder, replaced: dict[int, tuple[Tensor, Tensor]]):
        super().__init__()
        self.recorder, self.replaced = recorder, replaced

    def __torch_function__(self, func, types, args=(), kwargs=None):
        recorder = self.recorder
        if func in _READERS and recorder.node_of(args[0]) not in recorder.known:
            raise recorder.refusal(
                f"it reads a tensor's numbers out of torch ({_READERS[func]})", "use operations of torch"
            )
        if func == Tensor.data.__set__:
            raise recorder.refusal("it sets .data of a tensor", "make a new tensor")
        if self.replaced:
            args, kwargs = mapped((args, kwargs or {}), lambda x: self.replaced.get(id(x), (x, x))[1])
        return func(*args, **(kwargs or {}))


# ---- structures of arguments -----------------------------------------------------------------


def leaves(x):
    if isinstance(x, (list, tuple)):
        for e in x:
            yield from leaves(e)
    elif isinstance(x, dict):
        yield from leaves(list(x.values()))
    else:
        yield x


def mapped(x, change):
    """A structure of arguments with its tensors changed."""
    if isinstance(x, Tensor):
        return change(x)
    if type(x) in (list, tuple):
        return type(x)(mapped(e, change) for e in x)
    if type(x) is dict:
        return {k: mapped(v, change) for k, v in x.items()}
    return x

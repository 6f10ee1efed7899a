"""The operations that can be generated, by the name that ATen has for them, as C++ on one number of each operand.

``{0}``, ``{1}`` ... stand for the operands. Functions are those of csrc/compiled/lanes.h and math.h.
"""

from __future__ import annotations

import torch
from torch._decomp import core_aten_decompositions, get_decompositions

aten = torch.ops.aten

# Pointwise, of numbers: name of the ATen operation, without its overload, to C++.
POINTWISE = {
    "neg": "-{0}",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "reciprocal": "Real(1) / {0}",
    "square": "{0} * {0}",
    "cube": "{0} * {0} * {0}",
    "rsqrt": "Real(1) / square_root({0})",
    "sqrt": "square_root({0})",
    "abs": "magnitude({0})",
    "relu": "maximum({0}, zero<W>())",
    "maximum": "maximum({0}, {1})",
    "minimum": "minimum({0}, {1})",
    "pow": "pow({0}, {1})",
    "atan2": "atan2({0}, {1})",
    "fmod": "fmod({0}, {1})",
    "hypot": "hypot({0}, {1})",
    "where": "select({0}, {1}, {2})",
    "round": "round_even({0})",
    "isnan": "is_nan({0})",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "logical_and": "{0} & {1}",
    "logical_or": "{0} | {1}",
    "logical_not": "!{0}",
    "as_real": "select({0}, splat<W>(Real(1)), zero<W>())",
    "as_bool": "{0} != Real(0)",
    "copy": "{0}",
} | {
    name: name + "({0})"
    for name in (
        "exp expm1 log log1p sin cos tan tanh sinh cosh asin acos atan asinh acosh atanh sigmoid erf erfc "
        "floor ceil trunc sign"
    ).split()
}  # fmt: skip

# What the expressions above want as vectors where the result is one: everything else takes numbers too.
FUNCTIONS = frozenset(name for name, text in POINTWISE.items() if "({" in text)
COMPARISONS = frozenset("gt ge lt le eq ne isnan logical_and logical_or logical_not as_bool".split())

# In terms of those: more than ATen's core, in which activations and norms are operations of their own.
DECOMPOSITIONS = {
    **core_aten_decompositions(),
    **get_decompositions(
        [
            aten.gelu, aten.elu, aten.leaky_relu, aten.hardtanh, aten.softplus, aten.silu, aten.mish, aten.celu,
            aten.hardsigmoid, aten.hardswish, aten.log_sigmoid_forward, aten.selu, aten.threshold, aten.prelu,
            aten._softmax, aten._log_softmax, aten.native_layer_norm, aten.native_group_norm, aten.var, aten.std,
            aten.var_mean, aten.std_mean, aten.addmm, aten.baddbmm, aten.addmv, aten.addr, aten.mv, aten.dot,
            aten.linalg_vector_norm, aten.norm, aten.logsumexp, aten.logaddexp, aten.lerp, aten.addcmul, aten.addcdiv,
            aten.sinc, aten.xlogy, aten.mse_loss, aten.smooth_l1_loss, aten.huber_loss, aten.rsub, aten.mean,
            aten.stack, aten.unbind, aten.split, aten.t, aten.masked_fill, aten.clamp_min, aten.clamp_max,
            aten.deg2rad, aten.rad2deg, aten.sgn, aten.frac, aten.glu, aten.trace, aten.tril, aten.triu,
            aten.elu_backward, aten.gelu_backward, aten.silu_backward, aten.softplus_backward, aten.sigmoid_backward,
            aten.tanh_backward, aten.threshold_backward, aten.leaky_relu_backward, aten.hardtanh_backward,
            aten.hardsigmoid_backward, aten.hardswish_backward, aten.mish_backward, aten.log_sigmoid_backward,
            aten._softmax_backward_data, aten._log_softmax_backward_data, aten.native_layer_norm_backward,
            aten.native_group_norm_backward, aten.select_backward, aten.slice_backward, aten.diagonal_backward,
            aten.glu_backward, aten.embedding_dense_backward, aten.masked_fill_, aten.zero_, aten.fill_,
        ]
    ),
}  # fmt: skip


# ... and some that are common, so that torch's own need not be loaded: these take a second to import what
# they are written with.
def _softplus(x, beta=1, threshold=20):
    z = x if beta == 1 else x * beta
    return torch.where(z > threshold, x, z.exp().log1p() / beta)


def _softplus_backward(grad, x, beta, threshold):
    z = x if beta == 1 else x * beta
    return torch.where(z > threshold, grad, grad * z.sigmoid())


def _silu_backward(grad, x):
    s = x.sigmoid()
    return grad * (s * (1 + x * (1 - s)))


def _weight_norm_backward(grad, v, g, norms, dim):
    others = [i for i in range(v.ndim) if i != dim % v.ndim]
    along = (grad * v).sum(others, keepdim=True)
    return g / norms * (grad - v * (along / (norms * norms))), along / norms


def _sum_of(c, product, beta, alpha):
    product = product if alpha == 1 else product * alpha
    return product + (c if beta == 1 else c * beta)


DECOMPOSITIONS |= {
    aten.addmm.default: lambda c, a, b, *, beta=1, alpha=1: _sum_of(c, aten.mm(a, b), beta, alpha),
    aten.baddbmm.default: lambda c, a, b, *, beta=1, alpha=1: _sum_of(c, aten.bmm(a, b), beta, alpha),
    aten.threshold_backward.default: lambda grad, x, threshold: torch.where(x <= threshold, 0.0, grad),
    aten.sigmoid_backward.default: lambda grad, y: grad * (y * (1 - y)),
    aten.tanh_backward.default: lambda grad, y: grad * (1 - y * y),
    aten._weight_norm_interface_backward.default: _weight_norm_backward,
    aten.silu.default: lambda x: x * x.sigmoid(),
    aten.silu_backward.default: _silu_backward,
    aten.softplus.default: _softplus,
    aten.softplus_backward.default: _softplus_backward,
}

# Shapes: done on the slots themselves, by ATen.
SHAPES = frozenset(
    """permute t transpose expand expand_as slice select unsqueeze squeeze cat stack clone alias
    detach contiguous flip roll repeat index index_select gather diagonal tril triu constant_pad_nd slice_scatter select_scatter
    diagonal_scatter copy lift_fresh_copy lift_fresh split split_with_sizes unbind unfold diag_embed movedim view_as
    repeat_interleave broadcast_in_dim collapse_view view_of take_along_dim narrow chunk swapaxes unsafe_split broadcast_to flatten squeeze_copy""".split()
)

# Why some are refused, beside those that nobody has written yet.
REFUSED = {
    "convolution": "a convolution mixes places of an image, and its sizes are those of large fields",
    "native_batch_norm": "batch normalization mixes samples",
    "_native_batch_norm_legit": "batch normalization mixes samples",
    "_local_scalar_dense": "its value decides what is computed",
    "sort": "what it moves depends on values",
    "topk": "what it picks depends on values",
    "nonzero": "its shape depends on values",
}

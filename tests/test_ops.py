"""The registered operations against their formulas: all dtypes, odd sizes, strides, bad arguments."""

import pytest
import torch

from flashode import extension

if extension.C is None:
    pytest.skip(f"no compiled extension: {extension.missing}", allow_module_level=True)

ops = torch.ops.flashode
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZES = [0, 1, 31, 33, 1023, 1024, 1025, 1_000_001]


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def state(n, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64).to(device, dtype)


def slopes(count, n, dtype, device):
    return [state(n, dtype, device, seed=1 + j) for j in range(count)]


def coefficients(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def combine(y0, k, coef):
    """The definition, for one row."""
    total = coef[0].item() * wide(k[0])
    for c, k_j in zip(coef[1:].tolist(), k[1:]):
        total = total + c * wide(k_j)
    return (wide(y0) + total).to(y0.dtype)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_equals_its_formula_to_the_bit(dtype, n, device):
    for count in (1, 2, 4, 5, 7, 17):
        y0, k, coef = state(n, dtype, device), slopes(count, n, dtype, device), coefficients(count)
        assert torch.equal(ops.combine(y0, k, coef), combine(y0, k, coef))


@pytest.mark.parametrize("rows", [1, 2, 17, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_of_many_rows_is_each_row_alone(dtype, rows, device):
    y0, k, coef = state(1025, dtype, device), slopes(6, 1025, dtype, device), coefficients(rows, 6)
    result = ops.combine(y0, k, coef)
    assert result.shape == (rows, 1025)
    assert torch.equal(result, torch.stack([combine(y0, k, row) for row in coef]))


def test_combine_takes_any_strides_and_shapes(device):
    base, coef = state(24, torch.float64, device).reshape(4, 6), coefficients(2)
    y0, k = base.t(), [base.flip(0).t(), base[0, 0].expand(6, 4)]
    assert torch.equal(ops.combine(y0, k, coef), combine(y0, k, coef))
    scalar = base[0, 0]
    assert ops.combine(scalar, [scalar, scalar], coef).shape == ()


def test_combine_without_slopes_is_a_copy(device):
    y0 = state(5, torch.float32, device)
    result = ops.combine(y0, [], torch.zeros(0, dtype=torch.float64))
    assert torch.equal(result, y0) and result.data_ptr() != y0.data_ptr()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spread_is_combine_transposed(dtype, n, device):
    """Every slope is a weighted sum of the rows, in their order, rounded once."""
    for rows in (1, 2, 5):
        g = torch.stack(slopes(rows, n, dtype, device))
        coef = coefficients(rows, 4)
        zero = torch.zeros(n, dtype=dtype, device=device)
        expected = torch.stack([combine(zero, list(g), column) for column in coef.t()])
        assert torch.equal(ops.spread(g, coef), expected)
    assert torch.equal(ops.spread(g[0], coef[0]), ops.spread(g[:1], coef[:1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spread_takes_any_number_of_rows(dtype, device):
    """Each pass takes 20; a 16-bit result is rounded after the last."""
    for rows in (0, 20, 21, 65):
        g = torch.stack(slopes(rows, 33, dtype, device)) if rows else torch.empty(0, 33, dtype=dtype)
        coef = coefficients(rows, 3)
        expected = (coef.to(device).t() @ g.to(device).double()).to(dtype)
        unit = 0 if dtype in (torch.float16, torch.bfloat16) else 1e-5 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(ops.spread(g.to(device), coef), expected, rtol=unit, atol=unit)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inner_products_are_taken_in_double(dtype, n, device):
    g, k = torch.stack(slopes(3, n, dtype, device)), slopes(5, n, dtype, device)[::-1]
    expected = g.double() @ torch.stack(k).double().t()
    result = ops.inner(g, k)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12 * max(n, 1) ** 0.5)
    assert torch.equal(ops.inner(g[0], k), result[0])


def test_spread_and_inner_take_any_strides_and_shapes(device):
    base = state(48, torch.float64, device).reshape(2, 4, 6)
    coef = coefficients(3, 2).t()
    assert torch.equal(
        ops.spread(base.transpose(1, 2), coef),
        ops.spread(base.transpose(1, 2).contiguous(), coef.contiguous()),
    )
    assert torch.equal(
        ops.inner(base.transpose(1, 2), [base[0].t()]),
        ops.inner(base.transpose(1, 2).contiguous(), [base[0].t().contiguous()]),
    )
    scalar = base[0, 0, 0]
    assert ops.spread(scalar, coef[0]).shape == (3,) and ops.inner(scalar, [scalar] * 2).shape == (2,)


def scaled(y0, y1, k, coef, rtol, atol):
    error = coef[0].item() * wide(k[0])
    for c, k_j in zip(coef[1:].tolist(), k[1:]):
        error = error + c * wide(k_j)
    return error / (atol + rtol * torch.maximum(wide(y0).abs(), wide(y1).abs()))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_error_and_its_norm(dtype, n, device):
    y0, y1 = state(n, dtype, device, 50), state(n, dtype, device, 51)
    k, coef = slopes(6, n, dtype, device), coefficients(6)
    rtol, atol = torch.tensor(1e-2, dtype=torch.float64), torch.tensor(1e-3, dtype=torch.float64)
    expected = scaled(y0, y1, k, coef, 1e-2, 1e-3)
    assert torch.equal(ops.scaled_error(y0, y1, k, coef, rtol, atol), expected)
    norm = ops.error_norm(y0, y1, k, coef, rtol, atol, [0, n])
    mean = expected.double().square().mean() if n else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(norm.cpu(), mean.sqrt().cpu(), rtol=1e-13, atol=0)


def test_tolerances_may_differ_between_elements(device):
    n = 2049
    y0, y1, k = (
        state(n, torch.float32, device),
        state(n, torch.float32, device, 9),
        slopes(3, n, torch.float32, device),
    )
    coef, rtol, atol = (
        coefficients(3),
        torch.rand(n, device=device) + 0.1,
        torch.tensor(0.5, dtype=torch.float64),
    )
    assert torch.equal(ops.scaled_error(y0, y1, k, coef, rtol, atol), scaled(y0, y1, k, coef, rtol, 0.5))
    assert torch.equal(ops.scaled_error(y0, y1, k, coef, atol, rtol), scaled(y0, y1, k, coef, 0.5, rtol))


def test_the_norm_is_the_largest_of_the_members(device):
    offsets = [0, 0, 5, 2000, 2001, 9000, 9000]
    n = offsets[-1]
    y0, y1, k = (
        state(n, torch.float64, device),
        state(n, torch.float64, device, 3),
        slopes(4, n, torch.float64, device),
    )
    coef, tol = coefficients(4), torch.tensor(0.1, dtype=torch.float64)
    errors = scaled(y0, y1, k, coef, 0.1, 0.1)
    parts = [errors[a:b].square().mean().sqrt() for a, b in zip(offsets, offsets[1:]) if b > a]
    norm = ops.error_norm(y0, y1, k, coef, tol, tol, offsets)
    torch.testing.assert_close(norm.cpu(), max(parts).cpu(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("where", [0, 700, 4999])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["y1", "slope"])
def test_no_non_finite_value_passes_as_a_small_error(where, value, which, device):
    """An infinite y1 makes the tolerance infinite, and the quotient zero, if nothing is done."""
    n = 5000
    y0, y1, k = (
        state(n, torch.float32, device),
        state(n, torch.float32, device, 3),
        slopes(2, n, torch.float32, device),
    )
    (y1 if which == "y1" else k[1])[where] = value
    tol = torch.tensor(1e-3, dtype=torch.float64)
    for offsets in ([0, n], [0, 1000, n]):
        norm = ops.error_norm(y0, y1, k, coefficients(2), tol, tol, offsets)
        assert not torch.isfinite(norm)


def test_sums_do_not_depend_on_the_number_of_threads():
    n = 1_000_003
    y0, y1, k = (
        state(n, torch.float32, "cpu"),
        state(n, torch.float32, "cpu", 3),
        slopes(4, n, torch.float32, "cpu"),
    )
    coef, tol = coefficients(4), torch.tensor(1e-3, dtype=torch.float64)
    threads, sums = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            norm = ops.error_norm(y0, y1, k, coef, tol, tol, [0, 17, n]).item()
            sums.append((norm, *ops.inner(y0, k).tolist()))
    finally:
        torch.set_num_threads(threads)
    assert len(set(sums)) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
def test_opcheck_combine(dtype, rows, grad, device):
    for n in (1, 33):
        y0 = state(n, dtype, device).requires_grad_(grad)
        k = [x.requires_grad_(grad) for x in slopes(3, n, dtype, device)]
        coef = coefficients(3) if rows is None else coefficients(rows, 3)
        torch.library.opcheck(
            ops.combine.default, (y0, k, coef.requires_grad_(grad and dtype == torch.float64))
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_opcheck_derivatives_of_combine(dtype, rows, device):
    lead = () if rows is None else (rows,)
    g = state(33 * (rows or 1), dtype, device).reshape(*lead, 33).requires_grad_()
    k = [x.requires_grad_() for x in slopes(3, 33, dtype, device)]
    torch.library.opcheck(ops.spread.default, (g, coefficients(*lead, 3).requires_grad_()))
    torch.library.opcheck(ops.inner.default, (g, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_errors(dtype, device):
    y0, y1, k = state(33, dtype, device), state(33, dtype, device, 3), slopes(3, 33, dtype, device)
    tol, each = torch.tensor(1e-2, dtype=torch.float64), torch.rand(33, device=device) + 0.1
    for rtol, atol in ((tol, tol), (each, tol), (tol, each)):
        torch.library.opcheck(ops.scaled_error.default, (y0, y1, k, coefficients(3), rtol, atol))
        torch.library.opcheck(ops.error_norm.default, (y0, y1, k, coefficients(3), rtol, atol, [0, 4, 33]))


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_gradients_of_combine(rows, device):
    y0 = state(4, torch.float64, device).requires_grad_()
    k = [x.requires_grad_() for x in slopes(3, 4, torch.float64, device)]
    coef = (coefficients(3) if rows is None else coefficients(rows, 3)).requires_grad_()

    def function(y0, coef, *k):
        return ops.combine(y0, list(k), coef)

    assert torch.autograd.gradcheck(function, (y0, coef, *k))
    assert torch.autograd.gradgradcheck(function, (y0, coef, *k))


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_gradients_of_spread_and_inner(rows, device):
    lead = () if rows is None else (rows,)
    g = state(4 * (rows or 1), torch.float64, device).reshape(*lead, 4).requires_grad_()
    k = [x.requires_grad_() for x in slopes(2, 4, torch.float64, device)]
    coef = coefficients(*lead, 2).requires_grad_()
    for function, arguments in [
        (ops.spread, (g, coef)),
        (lambda g, *k: ops.inner(g, list(k)), (g, *k)),
    ]:
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("rows", [None, 3])
def test_combine_gives_gradients_to_those_who_ask(rows, device):
    lead = () if rows is None else (rows,)
    coef, ones = coefficients(*lead, 4), torch.ones(*lead, 3, dtype=torch.float64, device=device)
    total = (coef if rows is None else coef.sum(0)).tolist()
    for asks in [
        (True, False, False, False, True),
        (False, True, False, True, False),
        (False,) * 4 + (True,),
    ]:
        y0, *k = (state(3, torch.float64, device, seed=i).requires_grad_(a) for i, a in enumerate(asks))
        ops.combine(y0, k, coef).backward(ones)
        for x, weight, asked in zip([y0, *k], [float(rows or 1), *total], asks):
            assert (x.grad is not None) == asked
            if asked:
                torch.testing.assert_close(x.grad, torch.full_like(x, weight))


def test_combine_keeps_slopes_only_for_gradients_of_coefficients(device):
    """Changing a saved tensor in place would make the backward pass raise."""
    leaf = state(3, torch.float64, device).requires_grad_()
    slope = leaf * 1
    result = ops.combine(state(3, torch.float64, device), [slope], coefficients(1))
    slope.add_(1)
    result.sum().backward()
    torch.testing.assert_close(leaf.grad.cpu(), coefficients(1).expand(3))
    slope = leaf * 1
    result = ops.combine(state(3, torch.float64, device), [slope], coefficients(1).requires_grad_())
    slope.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(k=[torch.ones(4)]), "a slope is Float"),
        (dict(k=[torch.ones(3, dtype=torch.float64)]), "a slope is Double"),
        (dict(k=[torch.ones(3)] * 2), "coef must be"),
        (dict(coef=torch.ones(1)), "coef must be"),
        (dict(k=[torch.ones(3)] * 21, coef=torch.ones(21, dtype=torch.float64)), "at most"),
        (dict(coef=torch.ones(1, 1, 1, dtype=torch.float64)), "coef must be"),
    ],
    ids=["shape", "dtype", "count", "coef dtype", "too many", "coef shape"],
)
def test_bad_arguments_are_refused(change, text):
    arguments = dict(y0=torch.ones(3), k=[torch.ones(3)], coef=torch.ones(1, dtype=torch.float64)) | change
    with pytest.raises(ValueError, match=text):
        ops.combine(**arguments)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda g: ops.spread(g, torch.ones(2)), "spread: coef must be"),
        (lambda g: ops.spread(g, torch.ones(2, 2, dtype=torch.float64)), "spread: coef must be"),
        (lambda g: ops.spread(g[0, 0], torch.ones(1, 2, dtype=torch.float64)), "spread: coef must be"),
        (lambda g: ops.inner(g, []), "no slopes"),
        (lambda g: ops.inner(g, [g[0, 0]]), "g must be shaped like a slope"),
        (lambda g: ops.inner(g, [torch.ones(5)]), "a slope is Float"),
        (lambda g: ops.inner(g, [g[0].double()]), "a slope is Double"),
        (lambda g: ops.inner(g, [g[0]] * 21), "at most"),
    ],
    ids=["dtype", "rows", "no rows", "no slopes", "dimensions", "shape", "dtypes", "too many"],
)
def test_bad_arguments_of_derivatives_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.ones(3, 4))


def test_bad_offsets_and_tolerances_are_refused():
    y, coef, tol = torch.ones(3), torch.ones(1, dtype=torch.float64), torch.tensor(0.1)
    for offsets in ([0], [0, 2], [1, 3], [0, 2, 1, 3]):
        with pytest.raises(ValueError, match="offsets"):
            ops.error_norm(y, y, [y], coef, tol, tol, offsets)
    with pytest.raises(ValueError, match="tolerance"):
        ops.scaled_error(y, y, [y], coef, torch.ones(2), tol)
    with pytest.raises(TypeError, match="no kernel for dtype"):
        ops.combine(y.to(torch.complex64), [y.to(torch.complex64)], coef)


def test_a_compiled_function_may_contain_them(device):
    y0, k, coef = state(8, torch.float32, device), slopes(2, 8, torch.float32, device), coefficients(2)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda y, *k: ops.combine(y, list(k), coef) * 2)(
        y0, *k
    )
    assert torch.equal(traced(y0, *k), ops.combine(y0, k, coef) * 2)

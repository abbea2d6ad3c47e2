"""Expressions by the C kernel: the compiler, the functions, what is left to NumPy."""

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from cpu_kernels import only_kernels
from kernel_cases import REFERENCE, SIZES, special
from oracles import assert_same_bits

from nnx import losses
from nnx.backends import get_backend, numpy_backend
from nnx.backends.expressions import compiled
from nnx.layers.activations import FORMULAS

pytestmark = [pytest.mark.kernels, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

NUMBERS = {"slope": 0.01, "scale": 1.0507009873554805, "alpha": 1.6732632423543772, "beta": 1.3}
NUMBERS |= {"threshold": 20.0, "low": -1.0, "high": 1.5, "delta": 0.7, "n": 3, "ignored": 1}
NUMBERS |= {"inf": math.inf, "nan": math.nan, "tiny": 1e-30, "w": 0.3}
BIG = {np.dtype(np.float32): 88.0, np.dtype(np.float64): 709.0}

EXPRESSIONS = [expression for formula in FORMULAS.values() for expression in formula[:2]]
EXPRESSIONS += [
    expression
    for loss in vars(losses).values()
    for attribute in ("error", "value", "slope")
    if isinstance(expression := getattr(loss, attribute, None), str)
]
EXPRESSIONS += [  # of metrics and of losses with weights
    "maximum(y, 0) - y * t + log1p(exp(-abs(y)))",
    "where(t == ignored, 0, -(t * log(maximum(y, low)) + (1 - t) * log(maximum(1 - y, low))))",
    "where(t == y, -log(maximum(y, low)), where(t < 0, nan, where(t < n, 0, nan)))",
    "where(t == ignored, 0, 1)",
    "where(y == 0, 0, where(p == 0, inf, -y * log(where(p == 0, 1, p))))",
    "where(y == 0, 0, 1 / (where(y == 0, 1, y) * n))",
    "(y - t) * (y - t) / n",
    "-y / maximum(p, tiny)",
    "x >= y",
    "x != y",
    "sqrt(abs(x)) * sign(y)",
    "x",
]
FUNCTIONS = ("exp", "expm1", "log", "log1p", "tanh", "erf")
EXACT = [e for e in EXPRESSIONS if not any(name in e for name in FUNCTIONS)]


def operands_of(expression: str, arrays: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Those that it names."""
    names = compile(expression, "", "eval").co_names
    return {
        name: value
        for name, value in (arrays | NUMBERS | {"big": BIG[np.dtype(dtype)]}).items()
        if name in names
    }


def arrays_of(shape: Any, dtype: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    arrays = {name: special(rng, shape, dtype) for name in ("x", "dy", "y", "t", "p", "e")}
    arrays["t"][...] = rng.integers(-1, 4, shape)
    return arrays


def call(backend: Any, expression: str, like: Any, **operands: Any) -> np.ndarray:
    out = np.full(like.shape, np.nan, like.dtype)
    assert backend.elementwise(expression, out, **operands) is out
    return np.asarray(out)


# ---- expressions -------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", dict.fromkeys(EXACT))
def test_arithmetic_is_numpys_bit_for_bit(kernels: Any, expression: str, dtype: Any) -> None:
    arrays = arrays_of((13, 101), dtype)
    before = {name: a.copy() for name, a in arrays.items()}
    operands = operands_of(expression, arrays, dtype)
    found = call(kernels, expression, arrays["x"], **operands)
    expected = call(REFERENCE, expression, arrays["x"], **operands)
    np.testing.assert_array_equal(found, expected)
    for name, a in arrays.items():
        assert_same_bits(a, before[name])


@pytest.mark.parametrize("expression", [e for e in dict.fromkeys(EXPRESSIONS) if e not in EXACT])
def test_functions_in_expressions(kernels: Any, expression: str, dtype: Any) -> None:
    arrays = arrays_of((13, 101), dtype)
    operands = operands_of(expression, arrays, dtype)
    found = call(kernels, expression, arrays["x"], **operands)
    expected = call(REFERENCE, expression, arrays["x"], **operands)
    eps = float(np.finfo(dtype).eps)  # where terms cancel, errors are those of the terms
    np.testing.assert_allclose(found, expected, rtol=20 * eps, atol=10 * eps)


@pytest.mark.parametrize("size", [*SIZES, 511, 512, 513, 2049])
def test_any_size(kernels: Any, size: int, dtype: Any) -> None:
    x = special(np.random.default_rng(size), size, dtype)
    expression = "where(x < 0.5, 2 * x - y, x / y)"
    for shape in ((size,), (1, size), (size, 1, 1)):
        a, b = x.reshape(shape), x[::-1].copy().reshape(shape)
        found = call(kernels, expression, a, x=a, y=b)
        np.testing.assert_array_equal(found, call(REFERENCE, expression, a, x=a, y=b))


def test_no_axes_at_all(kernels: Any, dtype: Any) -> None:
    x = np.array(3.0, dtype)
    assert call(kernels, "x * x - 1", x, x=x) == 8


def test_an_element_is_the_same_wherever_it_is(kernels: Any) -> None:
    values = np.linspace(-4, 4, 37, dtype=np.float32)
    for name in FUNCTIONS:
        whole = call(kernels, f"{name}(x)", values, x=values)
        for start, stop in ((0, 1), (1, 18), (3, 37), (30, 37)):
            part = values[start:stop]
            assert_same_bits(call(kernels, f"{name}(x)", part, x=part), whole[start:stop])


def test_the_output_may_be_an_operand(kernels: Any, dtype: Any) -> None:
    arrays = arrays_of(1500, dtype)
    for expression in ("(1 - y * y) * x", "x", "x - y", "y / x + x", "where(x > y, y, x)"):
        operands = operands_of(expression, arrays, dtype)
        for name in operands:
            mine = {key: a.copy() for key, a in operands.items()}
            expected = call(REFERENCE, expression, arrays["x"], **operands)
            assert kernels.elementwise(expression, mine[name], **mine) is mine[name]
            np.testing.assert_array_equal(mine[name], expected)


@pytest.mark.parametrize("shift", [1, -1, 600])
def test_an_output_that_overlaps_an_operand_is_left_to_numpy(shift: int) -> None:
    backend = get_backend("numpy")
    whole = np.arange(3000, dtype=np.float32)
    expected = 2 * whole[1000:2000]
    out = whole[1000 + shift : 2000 + shift]
    backend.elementwise("2 * x", out, x=whole[1000:2000])
    np.testing.assert_array_equal(out, expected)


def test_bits_do_not_depend_on_threads(kernels: Any, dtype: Any) -> None:
    cpu: Any = numpy_backend.CPU
    arrays = arrays_of((300, 701), dtype)
    expression = FORMULAS["mish"].dx
    operands = operands_of(expression, arrays, dtype)
    threads = cpu.info()["threads"]
    results = []
    try:
        for n in (1, 2):
            cpu.set_num_threads(n)
            results.append(call(kernels, expression, arrays["x"], **operands))
    finally:
        cpu.set_num_threads(threads)
    assert_same_bits(*results)


@pytest.mark.unpoisoned
def test_nothing_is_allocated(kernels: Any) -> None:
    arrays = arrays_of((64, 512), np.float32)
    operands = operands_of(FORMULAS["gelu_tanh"].dx, arrays, np.float32)
    out = np.empty((64, 512), np.float32)
    kernels.elementwise(FORMULAS["gelu_tanh"].dx, out, **operands)
    tracemalloc.start()
    try:
        kernels.elementwise(FORMULAS["gelu_tanh"].dx, out, **operands)
        assert tracemalloc.get_traced_memory()[1] < 1024
    finally:
        tracemalloc.stop()


# ---- numbers -------------------------------------------------------------------------------------


def test_numbers_are_computed_in_float64(kernels: Any) -> None:
    x = np.array([1.0, 3.0], np.float32)
    a, b = 1 + 1e-9, 1.0  # float32 can't tell them apart
    for number in ("a - b", "a * b - b", "a / b - b", "-b + a", "-(b - a)"):
        found = call(kernels, f"x * ({number})", x, x=x, a=a, b=b)
        assert_same_bits(found, x * np.float32(a - 1))


def test_numbers_may_change_and_turn_into_arrays(kernels: Any, dtype: Any) -> None:
    x = np.arange(5, dtype=dtype)
    for a in (2, 0.5, x + 1, 7, x):
        np.testing.assert_array_equal(call(kernels, "x * a + 1", x, x=x, a=a), x * a + 1)
    np.testing.assert_array_equal(call(kernels, "x * a + 1", x, a=x, x=2, unused=3), x * 2 + 1)


def test_a_division_of_numbers_by_zero_is_an_error() -> None:
    x = np.ones(3, np.float32)
    with pytest.raises(ZeroDivisionError):
        get_backend("numpy").elementwise("x * (1 / a)", x.copy(), x=x, a=0.0)


# ---- what is left to NumPy -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression",
    [
        *("x ** 2", "x % 2", "x // 2", "+x", "x if 1 else y", "(x < y) * 1.5"),
        *("where(x < y, 0, 1) * 0.1", "where(x, y, 1)", "exp(1) * x", "maximum(1, 2) + x"),
        *("2 * 3", "abs(x < y)", "where(x < y, x < 0, 1)", "where(1 < 2, x, y)", "True * x"),
    ],
)
def test_other_expressions(expression: str) -> None:
    operations = numpy_backend._OPERATIONS
    assert compiled(expression, ("x", "y"), frozenset("xy"), operations) is None
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 50)).astype(np.float32)
    found = call(get_backend("numpy"), expression, x, x=x, y=y)
    np.testing.assert_array_equal(found, call(REFERENCE, expression, x, x=x, y=y))


def test_nonsense_is_pythons_to_refuse() -> None:
    x = np.ones(3, np.float32)
    for expression, error in (("x +", SyntaxError), ("z + x", NameError), ("f(x)", NameError)):
        with pytest.raises(error):
            get_backend("numpy").elementwise(expression, x.copy(), x=x)


@pytest.mark.parametrize("operand", [np.float64(1 / 3), True])
def test_other_numbers(operand: Any) -> None:
    x = np.array([1.0, 7.0], np.float32)
    found = call(get_backend("numpy"), "x * a * 3.0000001", x, x=x, a=operand)
    assert_same_bits(found, call(REFERENCE, "x * a * 3.0000001", x, x=x, a=operand))


def test_other_arrays(dtype: Any) -> None:
    backend, rng = get_backend("numpy"), np.random.default_rng(0)
    wide = rng.standard_normal((6, 8)).astype(dtype)
    for x in (wide[:, ::2], wide.T, wide[0, :1], np.broadcast_to(wide[0], (3, 8))):
        np.testing.assert_array_equal(call(backend, "x * 2 - 1", x, x=x), x * 2 - 1)
    swapped = wide.astype(wide.dtype.newbyteorder())
    np.testing.assert_array_equal(call(backend, "x * 2", swapped, x=swapped), wide * 2)
    out = np.full((6, 16), np.nan, dtype)
    backend.elementwise("x * 2", out[:, ::2], x=wide)
    np.testing.assert_array_equal(out[:, ::2], wide * 2)
    assert np.isnan(out[:, 1::2]).all()
    with pytest.raises(ValueError, match=r"expected y of shape \(6, 8\), got \(48,\)"):
        backend.elementwise("x + y", wide.copy(), x=wide, y=wide.reshape(-1))
    with pytest.raises(TypeError, match="expected y of"):
        backend.elementwise("x + y", wide.copy(), x=wide, y=wide.astype(np.int32))
    with pytest.raises(ValueError, match="expected unused of shape"):
        backend.elementwise("x + 1", wide.copy(), x=wide, unused=wide[0])
    frozen = wide.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        backend.elementwise("x + 1", frozen, x=wide)


def test_the_kernel_refuses_bad_programs() -> None:
    cpu: Any = numpy_backend.CPU
    x, operations = np.ones(8, np.float32), numpy_backend._OPERATIONS
    program = compiled("x * a + x", ("x", "a"), frozenset("x"), operations)
    assert program is not None
    names, code = program
    operands = {"x": x, "a": 2.0}
    out = np.empty_like(x)
    assert cpu.elementwise(program, out, operands)
    bad = [code[:i] for i in range(len(code))]
    bad += [code[:i] + bytes([250]) + code[i + 1 :] for i in range(len(code))]
    for other in bad:
        if other == code:
            continue
        cpu.elementwise((names, other), out, operands)  # a wrong result at worst
    for broken in ((names, bad[0]), (names[:1], code), ("xa", code)):
        assert not cpu.elementwise(broken, out, operands)
    assert not cpu.elementwise(program, out, {"x": x})
    assert not cpu.elementwise(program, out, {"x": x, "b": 2.0})


def test_equal_parts_are_computed_once_and_slots_are_used_again() -> None:
    operations = numpy_backend._OPERATIONS
    program = compiled("exp(x) * exp(x) + exp(x) / (2 * 3)", ("x",), frozenset("x"), operations)
    assert program is not None
    n_operands, n_constants, n_results, n_blank, n_steps = program[1][:5]
    assert (n_operands, n_constants, n_results, n_steps) == (1, 2, 1, 4)
    assert n_blank == 2
    chain = "x"
    for _ in range(20):
        chain = f"exp({chain} + x)"
    program = compiled(chain, ("x",), frozenset("x"), operations)
    assert program is not None
    assert tuple(program[1][3:5]) == (1, 40)


# ---- functions -----------------------------------------------------------------------------------

ULP = {"exp": 1.1, "log": 0.9, "expm1": 1.7, "log1p": 0.9, "tanh": 1.5, "erf": 1.8}
ORACLES = {name: getattr(math, name) for name in FUNCTIONS}


def oracle(name: str, x: np.ndarray) -> np.ndarray:
    """By Python's library, in float64; the limits where it raises."""

    def one(a: float) -> float:
        try:
            return float(ORACLES[name](a))
        except OverflowError:
            return math.inf
        except ValueError:
            return -math.inf if a == (0 if name == "log" else -1) else math.nan

    return np.array([one(a) for a in x.astype(np.float64).tolist()])


def errors(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """In units of the last place, where the true value is a number of the dtype."""
    there = np.abs(true) <= np.finfo(found.dtype).max
    spacing = np.spacing(np.abs(true[there]).astype(found.dtype))
    error: np.ndarray = np.abs(found[there] - true[there]) / spacing
    return error


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_in_float32(kernels: Any, name: str) -> None:
    """Every 99991st of all numbers; all of them by `bench/function_errors.py`."""
    x = np.arange(0, 1 << 32, 99991, dtype=np.int64).astype(np.uint32).view(np.float32)
    found, true = call(kernels, f"{name}(x)", x, x=x), oracle(name, x)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(true))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(np.isinf(found), np.isinf(true.astype(np.float32)))
    assert errors(found, true).max() <= ULP[name]
    few = x[(x > {"log": 0.0, "log1p": -1.0}.get(name, -20.0)) & (x < 20)]
    assert len(few) > 10_000
    assert errors(call(kernels, f"{name}(x)", few, x=few), oracle(name, few)).max() > 0.3


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_in_float64(kernels: Any, name: str) -> None:
    rng = np.random.default_rng(4)
    n = 10_000
    x = np.concatenate(
        [
            rng.uniform(-745, 709, n),
            rng.standard_normal(n) * 2.0 ** rng.integers(-12, 5, n),
            1 + rng.uniform(-1, 1, n) * 2.0 ** -rng.integers(0, 30, n),
            rng.integers(0, 2**64, n, np.uint64).view(np.float64),
        ]
    )
    found, true = call(kernels, f"{name}(x)", x, x=x), oracle(name, x)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(true))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(true))
    assert errors(found, true).max() <= ULP[name] + 1  # that of the oracle, which is rounded too


INF, NAN = math.inf, math.nan
LIMITS = {
    "exp": [(0.0, 1), (-0.0, 1), (INF, INF), (-INF, 0.0)],
    "expm1": [(0.0, 0.0), (-0.0, -0.0), (INF, INF), (-INF, -1)],
    "log": [(0.0, -INF), (-0.0, -INF), (1.0, 0.0), (INF, INF), (-INF, NAN), (-1.0, NAN)],
    "log1p": [(0.0, 0.0), (-0.0, -0.0), (-1.0, -INF), (INF, INF), (-2.0, NAN)],
    "tanh": [(0.0, 0.0), (-0.0, -0.0), (INF, 1), (-INF, -1), (1e30, 1)],
    "erf": [(0.0, 0.0), (-0.0, -0.0), (INF, 1), (-INF, -1), (-1e30, -1)],
    "sqrt": [(0.0, 0.0), (-0.0, -0.0), (INF, INF), (-1.0, NAN), (9.0, 3)],
    "abs": [(-0.0, 0.0), (-INF, INF)],
    "sign": [(0.0, 0.0), (-0.0, 0.0), (INF, 1), (-INF, -1), (-3.0, -1)],
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(kernels: Any, name: str, dtype: Any) -> None:
    x, expected = np.array([*LIMITS[name], (NAN, NAN)] * 5, dtype).T.copy()
    found = call(kernels, f"{name}(x)", x, x=x)
    there = ~np.isnan(expected)  # NaN has many bits
    np.testing.assert_array_equal(np.isnan(found), ~there)
    assert_same_bits(found[there], expected[there])


def test_the_ends_of_the_range(kernels: Any, dtype: Any) -> None:
    limits = np.finfo(dtype)
    tiny, small, largest = (
        float(a) for a in (limits.smallest_subnormal, limits.smallest_normal, limits.max)
    )
    # the last argument with a finite exponential, and the first without; likewise down to 0
    top = np.nextafter(dtype.type(math.log(largest)), dtype.type(0))
    x = np.array(
        [top, top + 0.01, math.log(small) - 1, math.log(tiny), math.log(tiny) - 0.7], dtype
    )
    found = call(kernels, "exp(x)", x, x=x)
    assert np.isfinite(found[0])
    assert np.isinf(found[1])
    assert 0 < found[2] < small  # subnormal
    assert found[3] == tiny
    assert found[4] == 0
    np.testing.assert_allclose(found[2], oracle("exp", x)[2], rtol=float(limits.eps) * 4)
    for name in ("expm1", "log1p", "tanh"):
        x = np.array([tiny, -tiny, 3 * small, -small], dtype)
        assert_same_bits(call(kernels, f"{name}(x)", x, x=x), x)
    x = np.array([tiny, small / 4, small, largest], dtype)
    expected = [math.log(a) for a in x.tolist()]
    found = call(kernels, "log(x)", x, x=x)
    np.testing.assert_allclose(found, expected, rtol=2 * float(limits.eps))
    found = call(kernels, "log1p(x)", x[3:], x=x[3:])
    np.testing.assert_allclose(found, expected[3:], rtol=2 * float(limits.eps))


def test_every_instruction_set_falls_within_its_own_kernels() -> None:
    x = np.ones(3, np.float32)
    with only_kernels("baseline") as backend, pytest.raises(pytest.fail.Exception):
        backend.elementwise("x ** 2", x.copy(), x=x)

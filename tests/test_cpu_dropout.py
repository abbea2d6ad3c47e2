"""The C kernels of dropout: NumPy's own words, and the bits of the definition."""

from typing import Any

import numpy as np
import oracles
import pytest
from kernel_cases import REFERENCE, SIZES, peak_of_a_step, special
from oracles import assert_same_bits

from nnx.backends import get_backend, numpy_backend
from nnx.backends.base import StepState

pytestmark = pytest.mark.kernels

# a block of the generator is 8 words, an item of the kernel 512
EDGES = [*SIZES, 511, 512, 513, 1024 + 7, 3 * 512]
DRAWS = [(0, 0, 0, 0), (7, 2, 1, 5), (2**64 - 1, 2**64 - 1, 2**64 - 1, 2**40), (2**63, 3, 0, 1)]


def at(number: int) -> StepState:
    state = get_backend("numpy").step_state()
    state.number = number
    return state


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("draw", DRAWS)
def test_masks_are_those_of_the_words_that_numpy_draws(
    kernels: Any, draw: tuple[int, int, int, int], size: int
) -> None:
    seed, stream, use, step = draw
    x, dtype = np.ones(size, np.float32), np.float32
    y, mask = kernels.dropout(x, 0.3, seed=seed, stream=stream, use=use, state=at(step))
    assert y.dtype == dtype
    dropped = oracles.dropped(0.3, (size,), seed, stream, use, step)
    np.testing.assert_array_equal(y == 0, dropped)
    np.testing.assert_array_equal(kernels.dropout_backward(x, mask, 0.3), y)


@pytest.mark.parametrize("p", [0.0, 2.0**-25, 0.1, 1 / 3, 0.5, 1 - 2.0**-24, 1.0])
@pytest.mark.parametrize("shape", [(), (0, 5), (7, 33), (2, 3, 129), (130, 10)])
def test_bits_are_those_of_the_definition(
    kernels: Any, shape: tuple[int, ...], p: float, dtype: Any, rng: np.random.Generator
) -> None:
    x, dy = special(rng, shape, dtype), special(rng, shape, dtype)
    copies = x.copy(), dy.copy()
    results = []
    for backend in (kernels, REFERENCE):
        y, mask = backend.dropout(x, p, seed=3, stream=1, use=2, state=at(4))
        results.append([y, backend.dropout_backward(dy, mask, p)])
    for found, expected in zip(*results, strict=True):
        assert_same_bits(found, expected)
    assert_same_bits(x, copies[0])
    assert_same_bits(dy, copies[1])


def test_a_word_exactly_at_p_is_kept(kernels: Any) -> None:
    words = oracles.words32(0, 0, 4096)
    edges = [(i, w) for i, w in enumerate(words) if w > 0 and w % 256 == 0]
    assert len(edges) > 3
    for i, word in edges[:4]:
        p = (word >> 8) * 2.0**-24
        ones = np.ones(4096)
        y, mask = kernels.dropout(ones, p, seed=0, stream=0, use=0, state=at(0))
        np.testing.assert_array_equal(y == 0, oracles.dropped(p, (4096,), 0, 0))
        assert y[i] > 0
        assert_same_bits(kernels.dropout_backward(ones, mask, p), y)


def test_two_threads_give_the_bits_of_one(
    kernels: Any, dtype: Any, rng: np.random.Generator
) -> None:
    cpu: Any = numpy_backend.CPU
    x = rng.standard_normal((301, 333)).astype(dtype)
    threads, found = cpu.info()["threads"], []
    for n in (1, 2):
        cpu.set_num_threads(n)
        try:
            y, mask = kernels.dropout(x, 0.4, seed=1, stream=0, use=0, state=at(2))
            found.append([y, kernels.dropout_backward(x, mask, 0.4)])
        finally:
            cpu.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        assert_same_bits(b, a)


def test_a_step_allocates_nothing(kernels: Any) -> None:
    x, state = np.ones((100, 100), np.float32), at(3)

    def step() -> None:
        _, mask = kernels.dropout(x, 0.5, seed=1, stream=2, use=0, state=state)
        kernels.dropout_backward(x, mask, 0.5)

    assert peak_of_a_step(step) < 2048


def test_layouts_that_no_kernel_takes_are_left_to_numpy(
    dtype: Any, rng: np.random.Generator
) -> None:
    backend = get_backend("numpy")
    wide = rng.standard_normal((6, 14)).astype(dtype)
    dy, draw = wide[:, 1::2], {"seed": 1, "stream": 2, "use": 3}
    dropped = oracles.dropped(0.5, (6, 7), 1, 2, 3, 9)
    for x in (wide[:, ::2], np.asfortranarray(wide[:, :7]), wide[:, :7].copy()):
        y, mask = backend.dropout(x, 0.5, **draw, state=at(9))
        assert_same_bits(np.ascontiguousarray(y), np.where(dropped, 0, 2 * x).astype(dtype))
        for g in (dy, np.ascontiguousarray(dy)):  # of a kernel's mask by NumPy, and the reverse
            dx = backend.dropout_backward(g, mask, 0.5)
            assert_same_bits(np.ascontiguousarray(dx), np.where(dropped, 0, 2 * g).astype(dtype))


def test_arguments_that_do_not_fit_are_declined_untouched(dtype: Any) -> None:
    cpu: Any = numpy_backend.CPU
    x, mask = np.ones((3, 5), dtype), np.zeros((3, 5), bool)
    other = np.float64 if dtype == np.float32 else np.float32

    def calls(out: Any) -> list[tuple[Any, list[Any]]]:
        return [
            (cpu.dropout, [x, out, mask.copy(), 0.5, 1, 2, 3, at(4)]),
            (cpu.dropout_backward, [x, out, mask.copy(), 0.5]),
        ]

    for i, wrong in [
        *((i, w) for i in range(3) for w in (None, 3, np.ones((3, 4), dtype), np.ones(15, other))),
        *((0, w) for w in (x.astype(other), x.T, x[::-1], x.astype(x.dtype.newbyteorder(">")))),
        *((2, w) for w in (mask.T, mask.view(np.uint8), mask[:2])),
        *((3, w) for w in (-0.1, 1.1, float("nan"), None, "half")),
        *((i, w) for i in range(4, 8) for w in (-1, 2**64, 0.5, None)),
    ]:
        out = np.full((3, 5), 7, dtype)
        for function, arguments in calls(out):
            if i < len(arguments):
                arguments[i] = wrong
                assert function(*arguments) is False, (function, i, wrong)
                assert function(*arguments[:-1]) is False
        np.testing.assert_array_equal(out, 7)
    frozen = np.full((3, 5), 7, dtype)
    frozen.flags.writeable = False
    for function, arguments in calls(frozen):
        assert function(*arguments) is False
        arguments[1] = out
        assert function(*arguments) is True

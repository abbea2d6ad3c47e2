"""Random streams: NumPy's Philox word for word, and no two draws that share a word."""

import math
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import oracles
import pytest

from nnx.backends import philox


@pytest.mark.parametrize(
    ("seed", "stream", "use", "step"),
    [
        (0, 0, 0, 0),
        (1, 2, 3, 4),
        (2**64 - 1, philox.SHUFFLE, 2**64 - 1, 2**64 - 1),
        (12345, philox.INITIALIZE, 0, 10**12),
    ],
)
def test_words_are_those_of_philox_4x64_10(seed: int, stream: int, use: int, step: int) -> None:
    # a draw advances word 0 of the counter only, from 1; low halves come first
    blocks = [oracles.philox_block((seed, stream), (b, use, 0, step)) for b in (1, 2, 3)]
    expected = [half for b in blocks for word in b for half in (word & 0xFFFFFFFF, word >> 32)]
    words = philox.words(seed, stream, 23, use=use, step=step)
    assert words.dtype == np.uint32
    assert words.tolist() == expected[:23]
    assert words.tolist() == oracles.words32(seed, stream, 23, use, step)


def test_words_are_the_bits_of_numpy_float32_draws() -> None:
    key, counter = np.array([7, 3], np.uint64), np.array([0, 2, 0, 9], np.uint64)
    reference = np.random.Generator(np.random.Philox(key=key, counter=counter))
    words = philox.words(7, 3, 1001, use=2, step=9)
    drawn = (words >> 8).astype(np.float32) * np.float32(2**-24)
    oracles.assert_same_bits(drawn, reference.random(1001, np.float32))


def test_generator_starts_the_stream_that_words_reads() -> None:
    raw = philox.philox(7, 3, use=2, step=9).random_raw(8)
    assert raw.astype("<u8").view("<u4").tolist() == philox.words(7, 3, 16, use=2, step=9).tolist()
    drawn = philox.generator(7, 3, use=2, step=9).random(16, np.float32)
    expected = [float(Fraction(w >> 8, 2**24)) for w in oracles.words32(7, 3, 16, 2, 9)]
    assert drawn.tolist() == expected


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 1000])
def test_words_of_any_number_begin_alike(n: int) -> None:
    words = philox.words(5, 1, n)
    assert words.shape == (n,)
    assert words.tolist() == philox.words(5, 1, 1003)[:n].tolist()


def test_words_remember_nothing_of_the_draw_before() -> None:
    first = philox.words(1, 2, 5, use=3, step=4)
    philox.words(9, 9, 3)
    assert philox.words(1, 2, 5, use=3, step=4).tolist() == first.tolist()


def test_words_in_threads_do_not_disturb_each_other() -> None:
    def draw(seed: int) -> list[list[int]]:
        return [philox.words(seed, 0, 101, step=step).tolist() for step in range(50)]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, range(4)))
    assert together == [draw(seed) for seed in range(4)]


def test_no_word_is_shared_by_two_steps_uses_streams_or_seeds() -> None:
    # a shift of one stream against another would show as equal 64-bit words somewhere
    seen: set[int] = set()
    draws = [
        (seed, stream, use, step)
        for seed in (0, 1)
        for stream in (0, 1, philox.SHUFFLE, philox.SPLIT, philox.INITIALIZE)
        for use in (0, 1)
        for step in (0, 1, 2)
    ]
    for seed, stream, use, step in draws:
        seen.update(philox.words(seed, stream, 1000, use=use, step=step).view(np.uint64).tolist())
    assert len(seen) == len(draws) * 500


@pytest.mark.parametrize(
    "p",
    [
        0.0,
        2.0**-25,
        2.0**-24,
        math.nextafter(2.0**-24, 1),
        3 * 2.0**-24,
        0.1,
        0.3,
        0.5,
        math.nextafter(0.5, 0),
        math.nextafter(0.5, 1),
        0.9,
        1 - 2.0**-24,
        math.nextafter(1 - 2.0**-24, 1),
        math.nextafter(1, 0),
        1.0,
    ],
)
def test_drop_threshold_is_exact(p: float) -> None:
    threshold = philox.drop_threshold(p)
    assert 0 <= threshold <= 2**32
    for k in {0, 1, 2, 3, *(int(p * 2**24) + i for i in (-1, 0, 1)), 2**24 - 1}:
        if 0 <= k < 2**24:
            for word in (k << 8, (k << 8) + 255):  # the lowest eight bits never matter
                assert (word < threshold) == (Fraction(k, 2**24) < Fraction(p))


def test_check_seed_keeps_64_bits() -> None:
    assert philox.check_seed(2**64 - 1) == 2**64 - 1
    seed = philox.check_seed(np.uint64(3))  # type: ignore[arg-type]
    assert (seed, type(seed)) == (3, int)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_check_seed_names_the_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"2\*\*64, got {seed}"):
        philox.check_seed(seed)


@pytest.mark.parametrize("seed", [1.0, "1", None, True])
def test_check_seed_names_what_is_no_integer(seed: object) -> None:
    with pytest.raises(TypeError, match=repr(seed)):
        philox.check_seed(seed)  # type: ignore[arg-type]

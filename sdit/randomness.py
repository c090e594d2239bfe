"""Counter-based random numbers: pure functions of a key, independent of the layout of ranks, workers and batches.

All counter-based generators are in this file. Their bits must never change, because runs of older versions continue.
B keys or sample indices, n numbers per key.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = Sequence[int] | NDArray[np.int64]

_WORD = 2**64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# Numbers are drawn in parts whose arrays stay in a core's cache. To free larger ones takes time with the interpreter lock.
_PART = 2**16


class Purpose(enum.Enum):
    """The use of a random number. It is part of the key, so that two purposes never share numbers.

    The value is the generator and the purpose's number in it.
    """

    SHARD_ORDER = ("splitmix", 1)
    MEMBER_ORDER = ("splitmix", 2)
    FLIP = ("splitmix", 3)
    POSTERIOR = ("splitmix", 4)
    PREPARATION_ORDER = ("splitmix", 5)
    TIMESTEP = ("philox", 0)
    STRATUM = ("philox", 1)
    LABEL_DROP = ("philox", 2)
    NOISE = ("philox", 3)
    SAMPLE_START = ("philox", 4)
    SAMPLE_STEP = ("philox", 5)

    def number(self, generator: str) -> int:
        """Return the purpose's number in the keys of `generator`."""
        assert self.value[0] == generator, f"{self} is not a purpose of {generator}"
        return int(self.value[1])


def keys(seed: int, purpose: Purpose, *words: np.ndarray | int) -> np.ndarray:
    """Return keys (B,) uint64. `words` are integers or (B,) arrays. Each is hashed by one splitmix64 step."""
    key = _mix(np.array([seed % _WORD], dtype=np.uint64) + _GOLDEN)
    for word in (purpose.number("splitmix"), *words):
        key = _mix(key + _GOLDEN * (np.atleast_1d(word).astype(np.uint64) + np.uint64(1)))
    return key


def bits(key: np.ndarray, count: int) -> np.ndarray:
    """Return the first `count` words (B, n) uint64 of each key's splitmix64 sequence (Steele, Lea, Flood 2014)."""
    return _mix(key[:, None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))


def coins(key: np.ndarray) -> np.ndarray:
    """Return one fair coin (B,) bool per key."""
    return bits(key, 1)[:, 0] >= np.uint64(2**63)


def permutation(key: np.ndarray, count: int) -> np.ndarray:
    """Return a permutation (n,) int64 of 0..n-1: the order of n random words of the single key."""
    return np.argsort(bits(key, count)[0], kind="stable")


def normals(key: np.ndarray, count: int) -> np.ndarray:
    """Return standard normal numbers (B, n) float32, two from each 64-bit word (Box and Muller 1958).

    They are computed in float64, whose last bits differ between CPUs. The rounded float32 values practically never differ.
    """
    numbers = np.empty((len(key), count), np.float32)
    words = (count + 1) // 2
    rows = max(1, _PART // max(1, words))
    scratch = np.empty((3, min(rows, len(key)), words), np.uint64)
    for start in range(0, len(key), rows):
        part = key[start : start + rows]
        _box_muller(part, numbers[start : start + rows], scratch[:, : len(part)])
    return numbers


def _box_muller(key: np.ndarray, numbers: np.ndarray, scratch: np.ndarray) -> None:
    """Fill `numbers` (B, n) float32: the cosines of all words of a key, then the sines. `scratch` is (3, B, n / 2) uint64.

    Logarithms, cosines and sines are written to another array than their input, because NumPy may compute them in another way
    in place.
    """
    words, other, third = scratch
    np.add(key[:, None], _GOLDEN * np.arange(1, words.shape[1] + 1, dtype=np.uint64), out=words)
    _mix_in_place(words, other)
    angle, uniform, radius = other.view(np.float64), third.view(np.float64), third.view(np.float64)
    np.bitwise_and(words, _LOW, out=third)
    np.multiply(third, 2 * np.pi * 2.0**-32, out=angle)
    np.right_shift(words, _HALF, out=words)
    np.add(words, np.uint64(1), out=words)
    np.multiply(words, 2.0**-32, out=uniform)
    logarithm = words.view(np.float64)
    np.log(uniform, out=logarithm)
    np.multiply(-2, logarithm, out=logarithm)
    np.sqrt(logarithm, out=radius)
    half, rest = words.shape[1], numbers.shape[1] - words.shape[1]
    np.cos(angle, out=logarithm)
    np.multiply(radius, logarithm, out=numbers[:, :half], casting="same_kind")
    np.sin(angle, out=logarithm)
    np.multiply(radius[:, :rest], logarithm[:, :rest], out=numbers[:, half:], casting="same_kind")


def priorities(seed: int, *words: np.ndarray) -> np.ndarray:
    """Return random uint64 (n,), one per row of the integer arrays. Each array is hashed by one splitmix64 step."""
    state = np.full(words[0].shape, seed % _WORD, dtype=np.uint64)
    for word in words:
        state = _mix((state ^ word.astype(np.uint64)) + _GOLDEN)
    return state


def uniform(seed: int, indices: Indices, purpose: Purpose) -> NDArray[np.float64]:
    """Return uniform numbers in (0, 1), float64 (B,), by Philox4x32-10.

    They depend on `seed` (< 2^64), the index and the purpose.
    """
    index = np.asarray(indices).astype(np.uint64)
    zero = np.zeros_like(index)
    counter = (index & _LOW, index >> _HALF, zero + np.uint64(purpose.number("philox")), zero)
    words = philox(counter, seed)
    return ((((words[0] << _HALF) | words[1]) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def normal_noise(
    seed: int, indices: Indices, shape: tuple[int, ...], purpose: Purpose, step: int = 0
) -> NDArray[np.float32]:
    """Return standard normal noise, float32 (B, *shape), by NumPy's Philox.

    It depends on `seed`, the index, the purpose and `step`.
    """
    noise = np.empty((len(indices), *shape), np.float32)
    philox_words = np.random.Philox(key=np.array([seed, purpose.number("philox")], np.uint64))
    draw = np.random.Generator(philox_words).standard_normal
    # A new generator per sample would hold the interpreter lock for longer than to set the state. Drawing does not hold it.
    state = philox_words.state  # its buffer is empty
    counter = state["state"]["counter"]
    counter[:] = (0, step, 0, 0)  # the low word increases within the sample
    for row, index in zip(noise, np.asarray(indices).tolist(), strict=True):
        counter[2] = index
        philox_words.state = state
        draw(dtype=np.float32, out=row)
    return noise


def named_seed(seed: int, name: str, item: int | None = None) -> int:
    """Return a 64-bit seed for one named generator, such as that of the initial values of a parameter."""
    digest = hashlib.blake2b(f"{seed}/{name}/{item}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


Words = tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]


def philox(counter: Words, key: int) -> Words:
    """Return Philox4x32-10 of four 32-bit counter words (B,) under a 64-bit key, vectorised (Salmon et al. 2011).

    NumPy's generators accept one key at a time, and only their raw bits are stable between versions.
    """
    c0, c1, c2, c3 = counter
    for turn in range(10):
        k0 = np.uint64(((key & 0xFFFFFFFF) + turn * _KEY_STEPS[0]) & 0xFFFFFFFF)
        k1 = np.uint64(((key >> 32) + turn * _KEY_STEPS[1]) & 0xFFFFFFFF)
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (odd >> _HALF) ^ c1 ^ k0, odd & _LOW, (even >> _HALF) ^ c3 ^ k1, even & _LOW
    return c0, c1, c2, c3


def _mix(words: np.ndarray) -> np.ndarray:
    """Return the splitmix64 finaliser of the words, a bijection in which each output bit depends on all input bits."""
    mixed = words.copy()
    _mix_in_place(mixed, np.empty_like(mixed))
    return mixed


def _mix_in_place(words: np.ndarray, scratch: np.ndarray) -> None:
    """Replace words by their finaliser. `scratch` has their shape."""
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, None)):
        np.right_shift(words, np.uint64(shift), out=scratch)
        np.bitwise_xor(words, scratch, out=words)
        if factor is not None:
            np.multiply(words, factor, out=words)

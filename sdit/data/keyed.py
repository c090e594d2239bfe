"""Random numbers as pure functions of a key, so that no layout of ranks, workers or batches can change them.

B keys, n numbers per key.
"""

from __future__ import annotations

import enum

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_WORD = 2**64


class Draw(enum.IntEnum):
    """What a number is used for; part of the key, so that two uses never share numbers."""

    SHARDS = 1
    MEMBERS = 2
    FLIP = 3
    POSTERIOR = 4
    PREPARE = 5


def keys(seed: int, draw: Draw, *words: np.ndarray | int) -> np.ndarray:
    """Keys (B,) uint64 of a draw; `words` are integers or (B,) arrays, each hashed in by one splitmix64 step."""
    key = _mix(np.array([seed % _WORD], dtype=np.uint64) + _GOLDEN)
    for word in (int(draw), *words):
        key = _mix(key + _GOLDEN * (np.atleast_1d(word).astype(np.uint64) + np.uint64(1)))
    return key


def bits(key: np.ndarray, count: int) -> np.ndarray:
    """The first `count` words (B, n) uint64 of each key's splitmix64 sequence (Steele, Lea, Flood 2014)."""
    return _mix(key[:, None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))


def coins(key: np.ndarray) -> np.ndarray:
    """One fair coin (B,) bool per key."""
    return bits(key, 1)[:, 0] >= np.uint64(2**63)


def permutation(key: np.ndarray, count: int) -> np.ndarray:
    """A permutation (n,) int64 of 0..n-1: the order of n random words of the single key."""
    return np.argsort(bits(key, count)[0], kind="stable")


def normals(key: np.ndarray, count: int) -> np.ndarray:
    """Standard normal draws (B, n) float32, two from each 64-bit word (Box and Muller 1958).

    Computed in float64: its last bits differ between CPUs, those of the rounded float32 practically never do.
    """
    words = bits(key, (count + 1) // 2)
    radius = np.sqrt(-2 * np.log(((words >> np.uint64(32)) + np.uint64(1)) * 2.0**-32))
    angle = (words & np.uint64(2**32 - 1)) * (2 * np.pi * 2.0**-32)
    pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs[:, :count].astype(np.float32)


def _mix(words: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection of 64-bit words whose output bits all depend on all input bits."""
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    mixed: np.ndarray = words ^ (words >> np.uint64(31))
    return mixed

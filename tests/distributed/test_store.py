"""The store of a launch: JSON values, and a time limit for each call."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from sdit.distributed.store import JsonStore


@pytest.fixture
def store() -> Iterator[JsonStore]:
    listener = socket.create_server(("127.0.0.1", 0))
    yield JsonStore("127.0.0.1", listener.getsockname()[1], "a", 20.0, listener)


def test_values_are_json_and_the_first_one_stays(store: JsonStore) -> None:
    assert not store.has("x")
    assert store.set_once("x", {"rank": 1, "names": ["ä"]}) == {"rank": 1, "names": ["ä"]}
    assert store.set_once("x", None) == store.get("x", 1.0) == {"rank": 1, "names": ["ä"]}
    store.set("x", 2)
    assert store.has("x") and store.get("x", 1.0) == 2


def test_missing_value_ends_the_wait(store: JsonStore) -> None:
    with pytest.raises(TimeoutError):
        store.get("missing", 0.2)
    store.set("missing", 1)
    assert store.get("missing", 0.2) == 1


def test_server_that_never_answers_ends_the_wait() -> None:
    """torch itself waits without a limit for a listener that accepts and sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ConnectionError):
        JsonStore("127.0.0.1", silent.getsockname()[1], "a", 0.5)

"""What is made ahead comes in order, once, and anew where the order changes."""

import threading

import pytest

from hpcavg.training.prefetch import Prefetch


def make(num_threads, made):
    def item(position):
        made.append((position, threading.current_thread().name))
        if position == 13:
            raise ValueError("thirteen")
        return position * position

    return Prefetch(item, lambda position: position + 1, num_threads)


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_items_come_in_order_and_are_made_once(num_threads):
    made = []
    prefetch = make(num_threads, made)
    assert [prefetch.get(position) for position in range(10)] == [p * p for p in range(10)]
    prefetch.forget()
    positions = sorted(position for position, _ in made)
    assert positions == sorted(set(positions))
    assert 9 <= positions[-1] <= 9 + num_threads
    own = threading.current_thread().name
    assert all((name == own) == (num_threads == 0) for _, name in made)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_another_position_is_made_anew(num_threads):
    prefetch = make(num_threads, [])
    assert [prefetch.get(position) for position in (1, 2, 7, 8, 3, 3)] == [1, 4, 49, 64, 9, 9]


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_error_comes_where_its_item_would(num_threads):
    prefetch = make(num_threads, [])
    assert prefetch.get(12) == 144
    with pytest.raises(ValueError, match="thirteen"):
        prefetch.get(13)
    assert prefetch.get(14) == 196

"""Fair share between owners: of equal priority they take turns, whoever came first with however much."""

from __future__ import annotations

from typing import Any

Driver = Any  # the fixture's class lives in conftest.py


def submit(queue: Driver, owner: str, count: int, name: str = "", priority: int = 0) -> None:
    """Submit a job of so many tasks that wait for nothing, and one that ends it."""
    nodes = [queue.node(f"{owner}{name}{number}") for number in range(count)]
    queue.submit([*nodes, queue.node(f"{owner}{name}end", *nodes)], owner=owner, priority=priority)


def claimed(queue: Driver, count: int) -> str:
    """Claim tasks one by one; return the first letters of their names."""
    return "".join(queue.claim(1)[0].label[0] for _ in range(count))


def test_owners_take_turns_whoever_came_first(queue: Driver) -> None:
    submit(queue, "ada", 12)
    submit(queue, "ben", 3)
    assert claimed(queue, 8) == "abababaa"


def test_who_comes_later_does_not_wait_and_has_not_saved_up_turns(queue: Driver) -> None:
    submit(queue, "ada", 12)
    tasks = [queue.claim(1)[0] for _ in range(5)]
    assert all(queue.finish(task.lease) for task in tasks[:4])
    submit(queue, "ben", 6)
    # Not five of his at once, though he had none so far.
    assert claimed(queue, 6) == "bababa"


def test_one_owner_is_served_in_order_of_arrival(queue: Driver) -> None:
    submit(queue, "ada", 3, "1")
    submit(queue, "ada", 3, "2")
    labels = [queue.claim(1)[0].label for _ in range(6)]
    assert labels == ["ada10", "ada11", "ada12", "ada20", "ada21", "ada22"]


def test_priority_goes_before_share(queue: Driver) -> None:
    submit(queue, "ada", 4)
    submit(queue, "ben", 4, priority=1)
    assert claimed(queue, 6) == "bbbbaa"


def test_a_task_that_two_owners_want_waits_for_the_earlier_turn(queue: Driver) -> None:
    first = [queue.node(f"a{number}") for number in range(6)]
    queue.submit([*first, queue.node("aend", *first)], owner="ada")
    own = queue.node("b")
    queue.submit([first[5], own, queue.node("bend", first[5], own)], owner="ben")
    labels = [queue.claim(1)[0].label for _ in range(3)]
    assert "a5" in labels

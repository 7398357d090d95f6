"""A pass that did not end, and a change that did not, are noticed by the next call; a refusal is neither."""

from collections.abc import Callable, Iterable

import pytest

from ..support.inside import PassGuard

Part = tuple[str, int, int]


def whole(_: Iterable[Part]) -> str | None:
    return None


def nothing() -> None: ...


def run(guard: PassGuard, *layers: int, name: str = "update") -> None:
    for layer in layers:
        guard.run((name, layer, 0), whole, nothing)


def raising(error: BaseException) -> Callable[[], None]:
    def change() -> None:
        raise error

    return change


def test_passes_through_all_layers_follow_each_other() -> None:
    guard = PassGuard(3)
    for _ in range(3):
        run(guard, 0, 1, 3)
    guard.check(whole)


@pytest.mark.parametrize("reached", [0, 1, 2])
def test_a_pass_that_stopped_is_noticed_by_the_next(reached: int) -> None:
    guard = PassGuard(3)
    run(guard, *range(reached + 1))
    calls: list[Callable[[], None]] = [lambda: run(guard, 0), lambda: guard.check(whole)]
    for call in calls:
        with pytest.raises(RuntimeError, match=f"interrupted between layer {reached} and layer 3.*`reset\\(\\)`"):
            call()
    guard.restart()
    run(guard, 0, 1, 2, 3)


def test_several_parts_of_a_layer_belong_to_one_pass() -> None:
    guard = PassGuard(1)
    for _ in range(2):
        for layer in (0, 1):
            run(guard, layer)
            run(guard, layer, name="update_indexer")


def test_a_refusal_changes_nothing_and_any_other_error_is_noticed() -> None:
    guard = PassGuard(1)
    with pytest.raises(ValueError, match="refused"):
        guard.run(("update", 0, 0), whole, raising(ValueError("refused")))
    run(guard, 0, 1)
    with pytest.raises(KeyboardInterrupt):
        guard.run(("update", 0, 0), whole, raising(KeyboardInterrupt()))
    with pytest.raises(RuntimeError, match="while the states of a layer were changed"):
        run(guard, 0)


def test_a_change_between_passes_is_whole_or_noticed() -> None:
    guard = PassGuard(1)
    with guard.changing(whole):
        pass
    with pytest.raises(IndexError), guard.changing(whole, IndexError):
        raise IndexError
    guard.check(whole)
    with pytest.raises(IndexError), guard.changing(whole):
        raise IndexError
    with pytest.raises(RuntimeError, match="interrupted"):
        guard.check(whole)


def test_damage_is_asked_for_between_passes_alone() -> None:
    guard, asked = PassGuard(1), []

    def damage(parts: Iterable[Part]) -> str | None:
        asked.append(sorted(parts))
        return "somewhere" if len(asked) > 2 else None

    for layer in (0, 1, 0):
        guard.run(("update", layer, 0), damage, nothing)
    assert asked == [[], [("update", 0, 0), ("update", 1, 0)]]
    guard.run(("update", 1, 0), damage, nothing)
    with pytest.raises(RuntimeError, match="interrupted somewhere"):
        guard.check(damage)

"""A forward pass is whole, or the next call says so.

A pass reaches the layers in their order. Nothing tells the cache that it ended, or that an exception ended it half-way:
that shows when the next pass begins before the last layer was reached.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")
# Which call of a pass: the method, the layer, the state of the layer.
Part = tuple[str, int, int]
Damage = Callable[[Iterable[Part]], str | None]


class PassGuard:
    """Follows each forward pass through the layers of a cache.

    Args:
        last_layer: index of the last layer that every pass reaches. Layers after it are those of some passes: the
            cross-attention to an image, which a pass without an image leaves alone.
    """

    def __init__(self, last_layer: int) -> None:
        self.last_layer = last_layer
        self.restart()

    def restart(self) -> None:
        """Begin a new stream."""
        self._layer_reached = self.last_layer
        self._parts_done: set[Part] = set()
        # True while states are changed, and after something interrupted that.
        self._is_changing = False

    def begin_reset(self) -> None:
        """Note that all states are dropped now; `restart` ends it."""
        self._is_changing = True

    def run(self, part: Part, damage: Damage, change: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
        """Change the states of a layer as a part of a pass. A ValueError is a refusal, which changes nothing.

        Args:
            part: which part.
            damage: see `check`.
            change: what to call with the other arguments.

        Raises:
            RuntimeError: if the part begins a pass after one that was interrupted.
        """
        if self._is_changing or part in self._parts_done or part[1] < self._layer_reached:
            self.check(damage)
            self._parts_done.clear()
        # `changing` in a form that is cheap enough for every layer.
        self._is_changing = True
        try:
            changed = change(*arguments, **options)
        except ValueError:
            self._is_changing = False
            raise
        self._layer_reached = part[1]
        self._parts_done.add(part)
        self._is_changing = False
        return changed

    @contextlib.contextmanager
    def changing(self, damage: Damage, *refusals: type[Exception]) -> Iterator[None]:
        """Inside, all layers are changed. If that is interrupted the next call says so, unless `refusals` refused it.

        Raises:
            RuntimeError: if a pass was interrupted before.
        """
        self.check(damage)
        self._is_changing = True
        try:
            yield
        except refusals:
            self._is_changing = False
            raise
        self._is_changing = False

    def check(self, damage: Damage) -> None:
        """Check that no pass and no change was interrupted.

        Args:
            damage: returns what does not belong together any more, given the parts of the last pass, or None.

        Raises:
            RuntimeError: if one was, or runs now.
        """
        if self._is_changing:
            what: str | None = "while the states of a layer were changed"
        elif self._layer_reached < self.last_layer:
            what = f"between layer {self._layer_reached} and layer {self.last_layer}"
        else:
            what = damage(self._parts_done)
        if what is not None:
            raise RuntimeError(
                f"A forward pass was interrupted {what}. Start a new stream with `reset()`. (Or the model skips "
                "layers, or has fewer than the `config` of the cache: make the cache with `model.config`. Or a pass "
                "runs now in another thread. Or some layers of the model are compiled, others not: compile all of it.)"
            )

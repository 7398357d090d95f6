"""The stream of a cache: its layers, the plan of the current forward pass, and what is checked once per pass."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..architecture.spec import CacheSpec
from ..compat import LinearAttentionLayer, PassWatch
from .checks import (
    COARSE_POSITION,
    check_batch,
    check_limit,
    check_no_pads,
    check_not_exported,
    check_not_read_again,
    check_rebased,
    check_states,
    check_window,
    layer_of_another_model,
    num_repeats,
    refuse_empty,
    refuse_unstored,
    warn_of_coarse_positions,
)
from .coordinates import Coordinates, coordinates_after
from .damage import DamageFinder
from .groups import Plan, SinkGroups
from .guard import PassGuard
from .layers import SinkLayer
from .layout import Layout, layout_of
from .mixed import IndexedSinkLayer, build_layers, drop_states
from .plan import UpdatePlan, WindowedPlan
from .positions import TokenPositions
from .static import CompilePolicy, StaticPlan


class Stream:
    """The tokens that a cache has seen, and the forward pass that runs.

    Args:
        spec: what each layer becomes.
        positions: at which positions the tokens of the first batch stand.

    Attributes:
        layers: the layers of the cache.
        first, last: the first and the last sink layer.
        layout: the slots and positions of the batch.
        coordinates: those of the last tokens, if positions are not token counts.
        watch: checks that a call goes the way that this library relies on.
    """

    def __init__(self, spec: CacheSpec, positions: TokenPositions) -> None:
        self.spec = spec
        self.watch = PassWatch()
        self.policy = CompilePolicy(spec.supports_static)
        self.groups = SinkGroups(self.policy)
        self.layers = build_layers(spec, self.groups)
        self._first_idx, self._last_idx = spec.sink_layers[0], spec.sink_layers[-1]
        self.first: SinkLayer = self.layers[self._first_idx]
        self.last: SinkLayer = self.layers[self._last_idx]
        self.sink_indices = frozenset(spec.sink_layers)
        self.layers_with = _layers_with_each_part(self.layers)
        self.first_attention_idx = min(self.layers_with["update"])
        self._damage = DamageFinder(self.layers, spec.text_layers)
        self._guard = PassGuard(spec.text_layers[-1])
        self.restart(positions)

    def restart(self, positions: TokenPositions) -> None:
        """Begin a new stream: the layers have dropped their states."""
        self.groups.clear()
        self.policy.expect_compiled_steps()
        self._warned_of_coarse_positions = False
        self.set_positions(positions)
        self._guard.restart()

    def set_positions(self, positions: TokenPositions, coordinates: Coordinates | None = None) -> None:
        """Let the tokens of the batch stand at other positions, or be those of another batch."""
        self.coordinates = coordinates
        self.layout: Layout = layout_of(self.spec.window_length, self.spec.num_sink_tokens, positions)
        self._static = StaticPlan(self.layout, is_sliding=self.spec.sliding_window < torch.inf)
        self._static.set(self.last.seen)
        self.groups.set_layout(self.layout)
        # The plan of the current pass, from the first question for its mask until its last layer is updated.
        self._plan: Plan | None = None

    def sink_layers(self) -> Iterator[SinkLayer]:
        """Yield all layers with sinks, those of indexers among them."""
        for layer in self.layers:
            if isinstance(layer, SinkLayer):
                yield from layer.sink_layers()

    # --- the plan of a pass

    def plan_for(
        self,
        layer: SinkLayer,
        query_length: int,
        announcing: bool = False,
        rebased: bool = False,
        positions: Tensor | None = None,
    ) -> Plan:
        """Return the plan of the current pass: the one that was announced, or a new one after the checks of a pass.

        Args:
            layer: the layer that asks.
            query_length: number of new tokens.
            announcing: True if the mask is made now, for this plan.
            rebased, positions: True if the caller gives the model positions as the cache counts them; see `announce`.

        Raises:
            ValueError, RuntimeError: see `SinkCache.update` and `SinkCache.get_mask_sizes`.
        """
        plan, compiling = self._plan, self.policy.is_compiling
        if compiling:
            check_not_exported()
        # Where layers are compiled one by one, the mask was made outside, for the plan that was announced there.
        may_be_static = announcing or (compiling and plan is not None and plan.all_slots)
        if may_be_static and query_length == 1 and self._is_static_step(layer):
            if plan is not self._static:
                self._check_static_step(rebased or (plan is not None and plan.rebased), compiling)
                self._plan = self._static
            return self._static
        self.sync()
        seen = layer.known_length
        if plan is None or isinstance(plan, StaticPlan) or not plan.fits(seen, query_length):
            if announcing and query_length == 1 and isinstance(plan, UpdatePlan) and plan.start == seen:
                self._plan = None  # if the pass was interrupted before its first layer, the next one is right
                refuse_unstored(plan)
            # A step that was announced in the static form, and is not compiled after all, keeps to that form.
            all_slots = isinstance(plan, StaticPlan) and query_length == 1 and layer.takes_static_steps
            rebased = rebased or all_slots
            coordinates = coordinates_after(self.coordinates, self.layout, seen, query_length, positions)
            plan = self._plan = self._new_plan(layer, seen, query_length, rebased, all_slots, coordinates)
        return plan

    def _is_static_step(self, layer: SinkLayer) -> bool:
        """Return True if a layer takes the next single token in the static form."""
        return self.coordinates is None and layer.takes_static_steps and self.policy.expects_static(layer.group.device)

    def _new_plan(
        self,
        layer: SinkLayer,
        seen: int,
        query_length: int,
        rebased: bool,
        all_slots: bool,
        coordinates: Coordinates | None,
    ) -> UpdatePlan:
        check_rebased(self.layout.positions, self.coordinates, rebased)
        self.check_limit(seen, query_length)
        in_order = self.spec.positions.needs_temporal_order
        plan = UpdatePlan(self.layout, seen, query_length, layer.num_evicted, in_order, all_slots, rebased, coordinates)
        check_window(plan, self.spec.sliding_window)
        return plan

    def announce(self, query_length: int, windowed: bool, positions: Tensor | None = None) -> Plan:
        """Return the plan of the coming pass, whose positions the caller takes from the cache.

        Args:
            query_length: number of new tokens.
            windowed: let each query of the chunk see its own window, by a mask that is made with the plan.
            positions: of the new tokens and of the text that would follow, `[num_axes, batch_size, query_length + 1]`,
                if they are not text.
        """
        self._plan = None
        if not windowed:
            return self.plan_for(self.first, query_length, announcing=True, rebased=True, positions=positions)
        self.sync()
        seen, evicted = self.first.known_length, self.first.num_evicted
        self.check_limit(seen, query_length)
        # The mask of the plan takes the place of the model's, whose sliding window therefore hides nothing.
        separate = self.spec.has_separate_layers
        coordinates = coordinates_after(self.coordinates, self.layout, seen, query_length, positions)
        self._plan = WindowedPlan(self.layout, seen, query_length, evicted, separate, coordinates)
        return self._plan

    def drop_plan(self) -> None:
        """End the current pass."""
        self._plan = None

    # --- the updates of a pass

    def update(self, layer_idx: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Update a sink layer, see `SinkCache.update`."""
        layer: SinkLayer = self.layers[layer_idx]
        plan, query_length = self._plan, key_states.shape[2]
        # What `plan_for` finds for the second layer of a pass and all that follow.
        if plan.__class__ is not UpdatePlan or layer.pending is not None or not plan.fits(layer.seen, query_length):
            plan = self.plan_for(layer, query_length)
        is_last = layer_idx == self._last_idx
        if isinstance(plan, StaticPlan):
            if layer_idx == self._first_idx:
                self._begin_compiled_step()
            returned = layer.update(key_states, value_states, plan)
        else:
            if layer_idx == self._first_idx:
                self.watch.begin_pass(query_length)
            if query_length > 1 or plan.start == 0:
                plan = self._check_padding(plan, layer_idx, key_states, value_states)
            change = self._update_at_pass_boundary if is_last or layer.pending is not None else SinkLayer.update
            if self.policy.is_compiling:
                returned = change(layer, key_states, value_states, plan)
            else:
                part = "update", layer_idx, 0
                returned = self._guard.run(part, self._damage, change, layer, key_states, value_states, plan)
        if is_last and not self.spec.positions.indexers:  # the last layer may still update its indexer
            self._plan = None
        return returned

    def _begin_compiled_step(self) -> None:
        self.watch.note_compiled_pass()
        self.policy.expect_compiled_steps()
        self.groups.count_step()

    def _check_padding(self, plan: UpdatePlan, layer_idx: int, key_states: Tensor, value_states: Tensor) -> UpdatePlan:
        """Check, before a layer takes new tokens, that what is known of padding holds for them; return their plan."""
        layer, positions, is_first = self.layers[layer_idx], self.layout.positions, plan.start == 0
        # Who announced the pass knows the padding. Tokens that may be taken back belong to a single row.
        is_known = plan.rebased or self.policy.is_compiling or (self.first.record_past and not is_first)
        may_be_pads = layer_idx == self.spec.positions.first_rotating_layer and not is_known
        may_repeat = is_first and layer_idx == self._first_idx
        if not (may_be_pads or may_repeat):
            return plan
        if may_be_pads and isinstance(layer, SinkLayer) and layer.is_initialized:
            layer.bring_back()
            check_states(layer.keys, layer.values, key_states, value_states)
        try:
            if may_repeat and self._repeat_padding(key_states):
                arguments = plan.query_length, plan.rebased, plan.all_slots, plan.coordinates
                plan = self._plan = self._new_plan(self.first, 0, *arguments)
            if may_be_pads:
                check_no_pads(self.layout.positions, plan.start, key_states, value_states)
                if isinstance(layer, SinkLayer) and not is_first:
                    check_not_read_again(layer.sinks, plan.start, layer.rotating(key_states, value_states))
        except ValueError as error:
            # Layers before this one, or a convolution beside it, took the tokens already.
            if layer_idx != self.spec.text_layers[0] or isinstance(layer, LinearAttentionLayer):
                if not is_first:
                    raise ValueError(f"{error} Start a new stream with `reset()`.") from error
                self.reset(positions)
            raise
        return plan

    def _repeat_padding(self, key_states: Tensor) -> bool:
        """Repeat the rows of the padding for beams and several answers to a prompt; return True if that was needed."""
        positions = self.layout.positions
        if positions.num_rows in (0, len(key_states)) or self.first.is_initialized:
            return False
        repeats = num_repeats(positions.num_rows, key_states, is_compiling=self.policy.is_compiling)
        self.set_positions(positions.select_rows(lambda rows: rows.repeat_interleave(repeats)))
        return True

    def _update_at_pass_boundary(
        self, layer: SinkLayer, key_states: Tensor, value_states: Tensor, plan: UpdatePlan
    ) -> tuple[Tensor, Tensor]:
        """Update the first layer of a pass after one that was recorded, or the last one of any pass."""
        if layer.pending is not None:
            layer.bring_back()
            check_states(layer.keys, layer.values, key_states, value_states)
        self._flush_pending(layer, plan)
        returned = layer.update(key_states, value_states, plan)
        if layer is self.last:
            self.coordinates = plan.coordinates
            self.policy.note_pass(plan.query_length)
            self.update_compiled_count()
        return returned

    def _flush_pending(self, layer: SinkLayer, plan: UpdatePlan) -> None:
        """Store what all layers recorded in the last pass, if `layer` did: the sinks of all are rotated together."""
        if layer.pending is not None:
            for each in self.sink_layers():
                each.flush_pending(plan.layout, plan.once)

    def update_indexer(self, layer: IndexedSinkLayer, indexer_key_states: Tensor) -> Tensor:
        """Update the indexer of a layer, see `SinkCache.update_indexer`."""
        plan = self.plan_for(layer.indexer, indexer_key_states.shape[1])
        if isinstance(plan, UpdatePlan):
            self._flush_pending(layer.indexer, plan)
        return layer.update_indexer(indexer_key_states, plan)

    def update_compiled_count(self) -> None:
        """Bring what compiled steps read up to date."""
        seen, evicted = self.last.seen, self.last.num_evicted
        self._static.set(seen)
        self.groups.set_count(seen, has_gap=evicted > max(seen + 1 - self.spec.window_length, 0))

    def sync(self) -> None:
        """Let Python know how many tokens compiled steps have taken. Waits for the device if there are any."""
        if self.groups.is_stale:
            seen = int(self.first.group.count)
            for layer in self.sink_layers():
                layer.seen = seen
            self.update_compiled_count()

    @property
    def has_unread_steps(self) -> bool:
        """True outside of a compiled model if compiled steps have counted tokens that Python does not know of."""
        return not self.policy.is_compiling and self.groups.is_stale

    def check_like_sink_layers(self, layer_idx: int, key_states: Tensor, value_states: Tensor) -> None:
        """Check states for a layer of another kind, which would take what the sink layers refuse."""
        first, layer, query_length = self.first, self.layers[layer_idx], key_states.shape[2]
        if first.is_initialized:
            check_batch(first.keys.shape[0], first.group.dtype, key_states)
        if not self.policy.is_compiling:
            self.check_limit(layer.get_seq_length(), query_length)
            if query_length > 1 and layer_idx == self.spec.positions.first_rotating_layer:
                plan = self._plan if layer_idx > self._first_idx else self.plan_for(first, query_length)
                if isinstance(plan, UpdatePlan):
                    self._check_padding(plan, layer_idx, key_states, value_states)

    def mask_sizes(self, query_length: int, layer: SinkLayer) -> tuple[Any, Any]:
        """Return the number of keys and the position of the first one, see `SinkCache.get_mask_sizes`."""
        if query_length == 0:
            refuse_empty(layer.get_seq_length())
        plan = self.plan_for(layer, query_length, announcing=True)
        if isinstance(plan, StaticPlan) and plan.needs_count:
            return plan.kv_length, plan.offset_after(layer.get_seq_length())
        return plan.kv_length, plan.kv_offset

    @property
    def expects_static_step(self) -> bool:
        """True if the next single token gets all slots."""
        return self._is_static_step(self.first) if self.first.is_initialized else self.policy.expects_static(None)

    # --- a pass is whole, or the next call says so

    def run(self, name: str, layer_idx: int, state_idx: int, change: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """Change the states of a layer as a part of a pass."""
        if layer_idx not in self.layers_with[name]:
            raise layer_of_another_model(self.layers, layer_idx)
        if self.policy.is_compiling:
            return change(*args, **kw)
        return self._guard.run((name, layer_idx, state_idx), self._damage, change, *args, **kw)

    @contextlib.contextmanager
    def changing(self, *refusals: type[Exception]) -> Iterator[None]:
        """Inside, all layers are changed between two passes; `refusals` change nothing."""
        self.sync()
        with self._guard.changing(self._damage, *refusals):
            self._plan = None
            for layer in self.sink_layers():
                layer.bring_back()
            yield
            self.update_compiled_count()

    def check(self) -> None:
        """Check that no pass and no change was interrupted or runs now; a RuntimeError says so."""
        self.sync()
        self._guard.check(self._damage)

    def positions_left(self, seen: int | None = None) -> int:
        """Return how many tokens can follow the `seen` ones, see `SinkCache.positions_left`."""
        if seen is None:
            steps = self._static.steps_announced + 1  # one may have been announced but not yet run
            seen = self.first.seen + steps if self.groups.is_stale else self.first.get_seq_length()
        if self.coordinates is not None:
            return self.spec.positions.limit - int(self.coordinates.before(seen).text(self.layout, 1).max())
        # The row with the fewest pads is the furthest.
        offset, least = self.layout.positions.offset, self.layout.positions.min_padding
        return self.spec.positions.limit - (seen - least - max(offset - least, 0))

    def check_limit(self, seen: int, query_length: int) -> None:
        """Check that `query_length` tokens can follow the `seen` ones."""
        left, limit = self.positions_left(seen), self.spec.positions.limit
        check_limit(left, limit, seen, query_length)
        if limit - left >= COARSE_POSITION and not self._warned_of_coarse_positions:
            self._warned_of_coarse_positions = True
            warn_of_coarse_positions(limit - left, self.spec.can_rebase)

    def _check_static_step(self, rebased: bool, compiling: bool) -> None:
        """Check a step that will be compiled, as far as that is possible without waiting for the device."""
        check_rebased(self.layout.positions, self.coordinates, rebased)
        if not compiling:
            self._static.announce()
            if self.positions_left() < 1:
                self.sync()
                self.check_limit(self.first.get_seq_length(), 1)

    def reset(self, positions: TokenPositions | None = None) -> None:
        """Drop the states of all layers and begin a new stream, whose rows are not padded if no `positions` say so."""
        self._guard.begin_reset()
        for layer in self.layers:
            drop_states(layer)
        self.restart(positions or TokenPositions())


def _layers_with_each_part(layers: list[Any]) -> dict[str, frozenset[int]]:
    """Return the indices of the layers that have each part of a forward pass."""

    def having(kind: type) -> frozenset[int]:
        return frozenset(i for i, layer in enumerate(layers) if isinstance(layer, kind))

    linear = ("get_conv_state", "update_conv_state", "update_recurrent_state")
    return {
        "update": having(CacheLayerMixin),
        "update_indexer": having(IndexedSinkLayer),
        **dict.fromkeys(linear, having(LinearAttentionLayer)),
    }

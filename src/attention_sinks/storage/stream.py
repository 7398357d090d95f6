"""The stream of a cache: its layers, the plan of the current forward pass, and what is checked once per pass."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ..architecture.spec import CacheSpec
from ..compat import DynamicIndexedLayer, LinearAttentionLayer, PassWatch
from .checks import (
    ACCURATE_POSITIONS,
    COARSE_POSITION,
    check_limit,
    check_no_pads,
    check_rebased,
    check_states,
    check_window,
    layer_of_another_model,
    num_repeats,
    refuse_empty,
    warn_of_coarse_positions,
)
from .damage import DamageFinder
from .groups import Plan, SinkGroups
from .guard import PassGuard
from .layers import SinkLayer
from .layout import Layout, layout_of
from .mixed import HybridSinkLayer, IndexedSinkLayer
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
        watch: checks that a call goes the way that this library relies on.
    """

    def __init__(self, spec: CacheSpec, positions: TokenPositions) -> None:
        self.spec = spec
        self.watch = PassWatch()
        self.policy = CompilePolicy(spec.supports_static)
        self.groups = SinkGroups(self.policy)
        self.layers = _build_layers(spec, self.groups)
        self._first_idx, self._last_idx = spec.sink_layers[0], spec.sink_layers[-1]
        self.first: SinkLayer = self.layers[self._first_idx]
        self.last: SinkLayer = self.layers[self._last_idx]
        self.num_layers = len(self.layers)
        self.sink_indices = frozenset(spec.sink_layers)
        self._first_rotating_idx = spec.first_rotating_layer
        self.attention_indices = frozenset(i for i, x in enumerate(self.layers) if isinstance(x, CacheLayerMixin))
        self.first_attention_idx = min(self.attention_indices)
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

    def set_positions(self, positions: TokenPositions) -> None:
        """Let the tokens of the batch stand at other positions, or be those of another batch."""
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

    def plan_for(self, layer: SinkLayer, query_length: int, announcing: bool = False, rebased: bool = False) -> Plan:
        """Return the plan of the current pass: the one that was announced, or a new one after the checks of a pass.

        Args:
            layer: the layer that asks.
            query_length: number of new tokens.
            announcing: True if the mask is made now, for this plan.
            rebased: True if the caller gives the model positions as `TokenPositions.position_ids` counts them.

        Raises:
            ValueError: see `SinkCache.update` and `SinkCache.get_mask_sizes`.
            NotImplementedError: if the model is exported.
        """
        plan, compiling = self._plan, self.policy.is_compiling
        if compiling and torch.compiler.is_exporting():
            raise NotImplementedError(
                "A SinkCache cannot be exported: its counts would be constants of the exported program. Compile the "
                "model with `torch.compile`, or export it with a cache of `transformers`."
            )
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
            # A step that was announced in the static form, and is not compiled after all, keeps to that form.
            all_slots = isinstance(plan, StaticPlan) and query_length == 1 and layer.takes_static_steps
            plan = self._plan = self._new_plan(layer, seen, query_length, rebased or all_slots, all_slots)
        return plan

    def _is_static_step(self, layer: SinkLayer) -> bool:
        """Return True if a layer takes the next single token in the static form."""
        return layer.takes_static_steps and self.policy.expects_static(layer.group.device)

    def _new_plan(self, layer: SinkLayer, seen: int, query_length: int, rebased: bool, all_slots: bool) -> UpdatePlan:
        check_rebased(self.layout.positions, rebased)
        self.check_limit(seen, query_length)
        in_order = self.spec.positions.needs_temporal_order
        plan = UpdatePlan(self.layout, seen, query_length, layer.num_evicted, in_order, all_slots, rebased)
        check_window(plan, self.spec.sliding_window)
        return plan

    def announce(self, query_length: int, windowed: bool) -> Plan:
        """Return the plan of the coming pass, whose positions the caller takes from `TokenPositions.position_ids`.

        Args:
            query_length: number of new tokens.
            windowed: let each query of the chunk see its own window, by a mask that is made with the plan.
        """
        self._plan = None
        if not windowed:
            return self.plan_for(self.first, query_length, announcing=True, rebased=True)
        self.sync()
        seen, evicted = self.first.known_length, self.first.num_evicted
        self.check_limit(seen, query_length)
        # The mask of the plan takes the place of the model's, whose sliding window therefore hides nothing.
        separate = self.spec.has_separate_layers
        self._plan = WindowedPlan(self.layout, seen, query_length, evicted, shares_buffers=separate)
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
        is_known = plan.rebased or self.policy.is_compiling or (layer.record_past and not is_first)
        may_be_pads = layer_idx == self._first_rotating_idx and not is_known
        if may_be_pads and layer.is_initialized:
            check_states(layer.keys, layer.values, key_states, value_states)
        try:
            if is_first and layer_idx == self._first_idx and self._repeat_padding(key_states):
                rebased, all_slots = plan.rebased, plan.all_slots
                plan = self._plan = self._new_plan(self.first, 0, plan.query_length, rebased, all_slots)
            if may_be_pads:
                check_no_pads(self.layout.positions, plan.start, key_states, value_states)
        except ValueError:
            if is_first and layer_idx != self.spec.text_layers[0]:  # layers before this one took the prompt already
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

    def check_like_sink_layers(self, layer: Any, key_states: Tensor) -> None:
        """Check states for a layer of another kind, which would take what the sink layers refuse."""
        first = self.first
        if first.is_initialized:
            stored, dtype = first.keys.shape[0], first.group.dtype
            if key_states.shape[0] != stored or key_states.dtype != dtype:
                raise ValueError(
                    f"`key_states` must keep batch size and dtype, {stored} and {dtype}, got the shape "
                    f"{[*key_states.shape]} in {key_states.dtype}. Call `reset()`, or use a new cache, to change them."
                )
        if not self.policy.is_compiling:
            self.check_limit(layer.get_seq_length(), key_states.shape[2])

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
        if self.first.is_initialized:
            return self._is_static_step(self.first)
        return self.policy.expects_static(None)

    # --- a pass is whole, or the next call says so

    def run(self, name: str, layer_idx: int, state_idx: int, change: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """Change the states of a layer as a part of a pass."""
        if layer_idx >= self.num_layers:
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
        """Check that no pass and no change was interrupted.

        Raises:
            RuntimeError: if one was, or runs now.
        """
        self.sync()
        self._guard.check(self._damage)

    # --- the end of the positions

    def positions_left(self, seen: int | None = None) -> int:
        """Return how many tokens can follow the `seen` ones, see `SinkCache.positions_left`."""
        if seen is None:
            # +1: a compiled step may have been announced but not yet run.
            steps = self._static.steps_announced + 1
            seen = self.first.seen + steps if self.groups.is_stale else self.first.get_seq_length()
        positions = self.layout.positions
        # The row with the fewest pads is the furthest.
        least = positions.min_padding
        return self.spec.positions.limit - (seen - least - max(positions.offset - least, 0))

    def check_limit(self, seen: int, query_length: int) -> None:
        """Check that `query_length` tokens can follow the `seen` ones."""
        left, limit = self.positions_left(seen), self.spec.positions.limit
        check_limit(left, limit, seen, query_length)
        if limit - left >= COARSE_POSITION and not self._warned_of_coarse_positions:
            self._warned_of_coarse_positions = True
            warn_of_coarse_positions(limit - left, self.spec.can_rebase)

    def needs_rebase(self, query_length: int) -> bool:
        """Return True if new tokens would reach the end of the positions, or where they are less accurate."""
        left = self.positions_left()
        accurate = max(ACCURATE_POSITIONS, 2 * self.spec.window_length)
        return self.spec.can_rebase and (query_length > left or self.spec.positions.limit - left >= accurate)

    def _check_static_step(self, rebased: bool, compiling: bool) -> None:
        """Check a step that will be compiled, as far as that is possible without waiting for the device."""
        check_rebased(self.layout.positions, rebased)
        if not compiling:
            self._static.announce()
            if self.positions_left() < 1:
                self.sync()
                self.check_limit(self.first.get_seq_length(), 1)

    def reset(self, positions: TokenPositions | None = None) -> None:
        """Drop the states of all layers and begin a new stream, whose rows are not padded if no `positions` say so."""
        self._guard.begin_reset()
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):  # it would keep tensors of the old batch
                LinearAttentionLayer.__init__(layer, number_of_states=layer.number_of_states)
            # Dropped before they would be zeroed: states of inference mode cannot be, outside of it. A layer without
            # sinks would go on recording.
            if isinstance(layer, DynamicLayer):
                layer.keys = layer.values = None
                layer.is_initialized = layer.record_past = False  # type: ignore[attr-defined]
            layer.reset()
        self.restart(positions or TokenPositions())


def _build_layers(spec: CacheSpec, groups: SinkGroups) -> list[Any]:
    """Return the layers of a cache: those of a `DynamicCache`, with sink layers in the place of some."""
    layers: list[Any] = list(spec.layers)
    window = spec.window_length, spec.num_sink_tokens
    for i in spec.sink_layers:
        rotation = spec.positions.rotations[i]
        if isinstance(layers[i], LinearAttentionLayer):
            layers[i] = HybridSinkLayer(*window, rotation, groups, number_of_states=layers[i].number_of_states)
        elif isinstance(layers[i], DynamicIndexedLayer):
            layers[i] = IndexedSinkLayer(*window, rotation, groups, spec.positions.indexers.get(i))
        else:
            layers[i] = SinkLayer(*window, rotation, groups)
    return layers

"""The layers of a `SinkCache`: what updates, and what changes a stream, do to their slots."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..fields import Device, NoneType, check_slots, checked, copied, placed
from .checks import check_agreement, check_states
from .groups import Plan
from .layout import Layout, Once, compute, write_slots
from .plan import UpdatePlan, WindowedPlan
from .slots import SlotLayer
from .static import StaticPlan, replaced

_ROWS = "The rows of all layers belong together: call this method of the cache, not of a layer."
# The attributes that are saved, and their types.
_ATTRIBUTES: dict[str, tuple[type, ...]] = {
    "is_initialized": (bool,),
    "seen": (int,),
    "num_evicted": (int,),
    "record_past": (bool,),
    "keys": (Tensor, NoneType),
    "values": (Tensor, NoneType),
    "pending": (list, tuple, NoneType),
}
FIELDS = {**_ATTRIBUTES, "sinks": (Tensor, NoneType), "device": (torch.device, NoneType)}


class SinkLayer(SlotLayer):
    """One layer of a `SinkCache`. The cache gives each update the plan of the forward pass."""

    def update(self, key_states: Tensor, value_states: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """Store the states of new tokens and return all that their queries attend to, see `SinkCache.update`."""
        if not self.is_initialized:
            check_agreement(key_states, value_states)
            self.lazy_initialization(key_states, value_states)
        if self._dtypes is not None:
            self.bring_back()
        check_states(self._keys, self._values, key_states, value_states)
        if isinstance(plan, StaticPlan):
            return self._overwrite_oldest(key_states, value_states, plan)
        if plan.overwrites and not self.record_past:
            returned = self._overwrite_oldest(key_states, value_states, plan)
            self.seen += 1
            return returned
        if isinstance(plan, WindowedPlan):
            return self._append_windowed(key_states, value_states, plan)
        return self._append(key_states, value_states, plan)

    def _overwrite_oldest(self, key_states: Tensor, value_states: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """Write one token over the oldest recent one, or into an empty slot; return the slots as they lie."""
        keys, values = self._keys, self._values
        if torch.is_grad_enabled():
            # A backward pass must not read what later tokens are written over. Gradients flow through new states only.
            keys, values = keys.clone(), values.clone()
            self._write_token(self._keys, self._values, key_states.detach(), value_states.detach(), plan)
        self._write_token(keys, values, key_states, value_states, plan)
        return keys, values

    def _write_token(self, keys: Tensor, values: Tensor, key_states: Tensor, value_states: Tensor, plan: Plan) -> None:
        if not (self._moves_sinks and (plan.rotates_sinks or plan.stores_sinks)):
            slot = self.group.slot_mapping(plan)
            write_slots(keys, slot, key_states)
            write_slots(values, slot, value_states)
            return
        (rotating, states), (others, other_states) = (keys, key_states), (values, value_states)
        if self._rotates_values:
            rotating, states, others, other_states = others, other_states, rotating, states
        slots, slot, sinks = self.group.step(plan, self._sinks_index)
        if plan.stores_sinks:
            # A row whose token is a sink has evicted nothing: its sinks are rotated by zero.
            is_new = plan.once(("new sinks", slot.device), torch.eq, slots.narrow(-1, 0, self.num_sink_tokens), slot)
            is_new = is_new[..., None, :, None]
            self.sinks.copy_(torch.where(is_new, states.detach(), self.sinks))
            sinks = torch.where(is_new, states, sinks)
        # One write for the sinks and the token. Where both have the same slot they are equal.
        write_slots(rotating, slots, torch.cat([sinks, states], dim=2))
        write_slots(others, slot, other_states)

    def _append(self, key_states: Tensor, value_states: Tensor, plan: UpdatePlan) -> tuple[Tensor, Tensor]:
        """Return the kept tokens and the new ones, in order."""
        # Views would be written over before a backward pass reads them, and while the past is recorded nothing is
        # stored yet.
        if plan.is_below_window and not (torch.is_grad_enabled() or self.record_past):
            self._store(key_states, value_states, plan.layout, plan.once)
            return self.keys[:, :, : plan.end], self.values[:, :, : plan.end]
        kept_keys, kept_values = self._kept_in_order(plan)
        returned = torch.cat([*kept_keys, key_states], dim=2), torch.cat([*kept_values, value_states], dim=2)
        if self.record_past:
            self.pending = key_states.detach(), value_states.detach()
        else:
            self._store(key_states, value_states, plan.layout, plan.once)
        return returned

    def _kept_in_order(self, plan: UpdatePlan) -> list[list[Tensor]]:
        """Return the kept keys and values as parts to concatenate, the sinks where they act in the pass."""
        rotated = None
        if self.rotation is not None and plan.rotates_sinks:
            rotated = self.group.rotated_sinks(plan, self._sinks_index)
        rotating = self.rotating(self.keys, self.values)
        return [
            plan.layout.kept_in_order(slots, self.seen, plan.evicted, rotated if slots is rotating else None, plan.once)
            for slots in (self.keys, self.values)
        ]

    def _append_windowed(self, key_states: Tensor, value_states: Tensor, plan: WindowedPlan) -> tuple[Tensor, Tensor]:
        """Return the sinks once per query, each copy rotated for its query, then the recent tokens and the chunk."""
        layout, query_length = plan.layout, plan.query_length
        recent = [
            layout.recent_in_order(slots, self.seen, plan.num_recent, plan.once) for slots in (self.keys, self.values)
        ]
        # Sinks may be among the new tokens. Then these are stored first, and the recent tokens are still valid: nothing
        # is evicted yet, or (padded) they are copies.
        if plan.stores_sinks:
            self._store(key_states, value_states, layout, plan.once)
        rotating = self.rotating(self.keys, self.values)
        returned = []
        for name, slots, parts, states in (
            ("keys", self.keys, recent[0], key_states),
            ("values", self.values, recent[1], value_states),
        ):
            if self.rotation is not None and slots is rotating:
                cos_sin = plan.cos_sin(self.group.rotation, self.sinks.dtype, slots.device)  # type: ignore[arg-type]
                each = self.sinks[:, :, None].expand(-1, -1, query_length, -1, -1)
                sinks = self.rotation.rotate_by(cos_sin, each).to(slots.dtype)
            else:
                sinks = layout.sinks(slots)[:, :, None].expand(-1, -1, query_length, -1, -1)
            returned.append(plan.concatenated(name, [sinks.flatten(2, 3), *parts, states]))
        if not plan.stores_sinks:
            self._store(key_states, value_states, layout, plan.once)
        return returned[0], returned[1]

    def _store(self, key_states: Tensor, value_states: Tensor, layout: Layout, once: Once) -> None:
        """Write the states of new tokens over those of the tokens that they evict, and count them."""
        key_states, value_states = key_states.detach(), value_states.detach()
        layout.write(self.keys, key_states, self.seen, once)
        layout.write(self.values, value_states, self.seen, once)
        if self.rotation is not None:
            layout.write_sinks(self.sinks, self.rotating(key_states, value_states), self.seen, once)
        self.seen += key_states.shape[2]

    def activate_past_recording(self) -> None:
        """Keep what each update evicts until the next call, so that `crop` can take the update back."""
        self.record_past = True

    def stop_recording(self, layout: Layout) -> None:
        """Store what is pending, and from now on every update at once."""
        self.flush_pending(layout)
        self.record_past = False

    def flush_pending(self, layout: Layout, once: Once = compute) -> None:
        """Store what is pending."""
        if self.pending is not None:
            self.bring_back()
            key_states, value_states = self.pending
            self.pending = None
            if key_states.shape[2] > 0:
                self._store(key_states, value_states, layout, once)

    def length_after_crop(self, tokens_to_remove: int, layout: Layout) -> int:
        """Return how many tokens will have been seen after `crop(tokens_to_remove)`.

        Raises:
            ValueError: if those to take back are not all held.
        """
        now, evicted = self.get_seq_length(), self.evicted_after(self.seen)
        seen = tokens_to_remove if tokens_to_remove > 0 else now + tokens_to_remove
        # Sinks can be taken back only while nothing was evicted between them and the end. Rows that evict at different
        # times cannot take anything back.
        least = evicted + self.num_sink_tokens if evicted > 0 else 0
        if evicted > 0 and not layout.evicts_together:
            least = self.seen
        if seen < least:
            raise ValueError(
                f"`tokens_to_remove` must be at least {least - now}, got {tokens_to_remove}: of the {now} tokens seen "
                f"the last {now - least} can be taken back."
            )
        return min(seen, now)

    def crop(self, tokens_to_remove: int, layout: Layout) -> None:
        """Take back the last `-tokens_to_remove` tokens, see `SinkCache.crop`."""
        seen = self.length_after_crop(tokens_to_remove, layout)
        if self.pending is not None:
            accepted = max(seen - self.seen, 0)
            self.pending = self.pending[0][:, :, :accepted], self.pending[1][:, :, :accepted]
            self.flush_pending(layout)
        self.num_evicted = self.evicted_after(self.seen)
        self.seen = seen

    def rebase(self, shift: Any, layout: Layout) -> None:
        """Rotate all states back by a number of positions, or by one for each row."""
        self.flush_pending(layout)
        if self.rotation is not None and self.is_initialized:
            rotation = self.group.rotation or self.rotation
            if isinstance(shift, Tensor):
                shift = shift.to(rotation.inv_freq.device)
            cos, sin = rotation.cos_sin(shift, self.sinks.dtype).to(self.keys.device)
            # In pieces, for the memory that float32 takes.
            for slots in self.rotating(self.keys, self.values).split(1024, dim=2):
                slots.copy_(rotation.rotate_by(torch.stack([cos, -sin]), slots))

    def move_kept_to_front(self, plan: UpdatePlan) -> None:
        """Move the kept tokens to the first slots, in order, as if nothing had been evicted."""
        if self.is_initialized:
            for slots, parts in zip((self.keys, self.values), self._kept_in_order(plan), strict=True):
                kept = torch.cat(parts, dim=2)
                slots[:, :, : kept.shape[2]] = kept

    def drop_evicted_from_count(self, num_evicted: int) -> None:
        """Do not count the first `num_evicted` tokens any more."""
        self.num_evicted = 0
        self.seen = max(self.seen - num_evicted, 0)

    def select_rows(self, index: Tensor, layout: Layout) -> None:
        """Keep the rows at `index`, in that order; rows may repeat."""
        if not self.is_initialized:
            return
        with torch.inference_mode(False):
            self.flush_pending(layout)

            def selected(states: Tensor) -> Tensor:
                return replaced(states, states.index_select(0, index.to(states.device)))

            self._keys, self._values = selected(self._keys), selected(self._values)
            self.groups.policy.mark_static(self._keys, self._values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError(_ROWS)

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError(_ROWS)

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotImplementedError(_ROWS)

    def sink_layers(self) -> Iterator["SinkLayer"]:
        """Yield this layer, and a layer inside of it."""
        yield self

    def state(self) -> dict[str, Any]:
        """Return what a file holds of this layer; tensors are copied to the CPU."""
        sinks = self.sinks if self.is_initialized and self.rotation is not None else None
        state = {name: getattr(self, name) for name in _ATTRIBUTES}
        return copied({**state, "sinks": sinks, "device": self.group.device if self.is_initialized else None})  # type: ignore[no-any-return]

    def restore(self, state: dict[str, Any], device: Device) -> None:
        """Take on a state; a `device` takes the place of the one it was saved from.

        Raises:
            ValueError: if it is not the state of such a layer, or its device is not at hand.
        """
        state = checked(state, FIELDS, f"a {type(self).__name__}")
        lengths = {"keys": self.window_length, "values": self.window_length}
        check_slots(state, lengths if self.rotation is None else {**lengths, "sinks": self.num_sink_tokens})
        for name in _ATTRIBUTES:
            setattr(self, name, placed(state[name], state["device"], device))
        if self.is_initialized:
            self.join_group(None if self.rotation is None else placed(state["sinks"], state["device"], device))

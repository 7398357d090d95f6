"""The slots of a layer: the sinks in the first ones, a ring of recent tokens in the others."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..rope import Rotation
from .checks import check_replacement
from .groups import SinkGroup, SinkGroups
from .plan import num_evicted_after


class SlotLayer(CacheLayerMixin):
    """W slots, see `Layout`, and pristine copies of the S sinks.

    `seen` tokens were fed; of those that are no sinks the first ones were evicted.

    Args:
        window_length, num_sink_tokens: W and S.
        rotation: the rotation of the cached states; None if they carry no position.
        groups: the groups of the cache.

    Attributes:
        keys, values: `[batch_size, num_heads, W, head_dim]`; None before the first update. A caller may replace them by
            copies of themselves, elsewhere or in another dtype, as `offload` does: the next update brings them back.
        group: the group that holds the pristine sinks; None before the first update.
        seen: number of tokens that are stored, or were. Compiled steps count in `SinkGroup.count`.
        num_evicted: number of evicted tokens that a `crop` does not bring back.
        pending: the last states while the past is recorded: the next call stores them.
    """

    _keys: Tensor = None  # type: ignore[assignment]
    _values: Tensor = None  # type: ignore[assignment]
    group: SinkGroup
    is_sliding = False

    def __init__(
        self, window_length: int, num_sink_tokens: int, rotation: Rotation | None, groups: SinkGroups, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self.window_length = window_length
        self.num_sink_tokens = num_sink_tokens
        self.rotation = rotation
        self._rotates_values = rotation is not None and rotation.in_values
        self._moves_sinks = rotation is not None and num_sink_tokens > 0
        self.groups = groups
        SlotLayer.reset(self)

    def reset(self) -> None:
        # The buffers are dropped, not zeroed, so that the next stream may have another batch size, dtype or device.
        self._keys = self._values = self.group = None  # type: ignore[assignment]
        # The dtypes of keys and values, while they are replaced.
        self._dtypes: tuple[torch.dtype, torch.dtype] | None = None
        self._sinks_index = 0
        self.is_initialized = False
        self.seen = self.num_evicted = 0
        self.record_past = False
        self.pending: tuple[Tensor, Tensor] | None = None

    @property
    def keys(self) -> Tensor:
        """The slots of the keys."""
        return self._keys

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self._note_replaced("keys", self._keys, keys)
        self._keys = keys

    @property
    def values(self) -> Tensor:
        """The slots of the values."""
        return self._values

    @values.setter
    def values(self, values: Tensor) -> None:
        self._note_replaced("values", self._values, values)
        self._values = values

    def _note_replaced(self, name: str, slots: Tensor | None, new: Tensor | None) -> None:
        """Check what a caller puts in the place of keys or values, and note that it may lie elsewhere.

        Raises:
            ValueError: if it has another shape, or other sinks.
        """
        if slots is None or new is None:  # no states
            return
        holds_sinks = self._moves_sinks and slots is self.rotating(self._keys, self._values)
        check_replacement(name, slots, new, self.groups.layout.sinks if holds_sinks else None)
        if self._dtypes is None:
            self._dtypes = self._keys.dtype, self._values.dtype

    def bring_back(self) -> None:
        """Copy keys and values that a caller has replaced to the device and the dtype of those before them."""
        if self._dtypes is not None:
            # Copies: they may share memory with other tensors, or be those of inference mode.
            with torch.inference_mode(False):
                pairs = zip((self._keys, self._values), self._dtypes, strict=True)
                self._keys, self._values = (
                    slots.detach().to(self.group.device, dtype, copy=True) for slots, dtype in pairs
                )
            self.groups.policy.mark_static(self._keys, self._values)
            self._dtypes = None

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the keys."""
        return None if self.group is None else self.group.dtype

    @property
    def device(self) -> torch.device | None:
        """Where new states are stored."""
        return None if self.group is None else self.group.device

    @property
    def sinks(self) -> Tensor:
        """The sinks as they were fed, `[batch_size, num_heads, S, head_dim]`, in float32 or wider."""
        return self.group.sinks(self._sinks_index)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """True while the past is recorded: then `crop` leaves no trace past the window either."""
        return self.record_past

    @property
    def takes_static_steps(self) -> bool:
        """True if a single token can be taken in the static form now."""
        return self._keys is not None and not self.record_past and self.pending is None and not self.groups.has_gap

    @property
    def known_length(self) -> int:
        """Number of tokens seen, pending ones included, as far as Python knows."""
        return self.seen + (0 if self.pending is None else self.pending[0].shape[2])

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, pending ones included. Waits for the device after compiled steps."""
        if self.groups.policy.is_compiling and self.groups.policy.supported and self.takes_static_steps:
            # A copy: flex attention reads it inside of the kernel, when the step has counted already.
            return self.group.count.clone()  # type: ignore[return-value]
        return int(self.group.count) if self.groups.is_stale and self.group is not None else self.known_length

    def get_max_length(self) -> int:
        return self.window_length

    get_max_cache_shape = get_max_length

    def evicted_after(self, seen: int) -> int:
        """Return the number of evicted tokens once `seen` were fed."""
        return num_evicted_after(seen, self.window_length, self.num_evicted)

    @property
    def kept_length(self) -> int:
        """Number of tokens held now."""
        length = self.get_seq_length()
        pending = 0 if self.pending is None else self.pending[0].shape[2]
        return min(length - self.evicted_after(length - pending), self.window_length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        seen = self.get_seq_length()
        kv_offset = self.evicted_after(seen + min(query_length, 1))
        return seen + query_length - kv_offset, kv_offset

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Outside of inference mode, whose tensors could not be written to later.
        with torch.inference_mode(False):
            self._keys = _empty_slots(key_states, self.window_length)
            self._values = _empty_slots(value_states, self.window_length)
            sinks = self.rotating(self._keys, self._values)[:, :, : self.num_sink_tokens]
            # Half-precision states are rotated in float32 and rounded once, in their slots.
            sinks = sinks.to(torch.promote_types(sinks.dtype, torch.float32), copy=True)
            self.join_group(None if self.rotation is None else sinks)
        self.is_initialized = True

    def join_group(self, sinks: Tensor | None) -> None:
        """Rotate the sinks, as they were fed, together with those of other layers; None if they carry no position."""
        self.group = self.groups.join(self.rotation, self._keys, None if sinks is None else sinks.shape)
        if sinks is not None:
            self._sinks_index = self.group.add(sinks)
            self.groups.policy.mark_static(sinks)
        self.groups.policy.mark_static(self._keys, self._values)

    def rotating(self, key_states: Tensor, value_states: Tensor) -> Tensor:
        """Return those of the two that carry the position."""
        return value_states if self._rotates_values else key_states


def _empty_slots(states: Tensor, window_length: int) -> Tensor:
    batch_size, num_heads, _, head_dim = states.shape
    return states.new_zeros(batch_size, num_heads, window_length, head_dim)

"""What `transformers` calls on a cache of which some layers keep sinks."""

from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import Cache

from .architecture.spec import check_int
from .fields import Device
from .storage import changes
from .storage.checks import layer_of_another_model
from .storage.stream import Stream


class StreamCache(Cache):
    """What `transformers` calls on a cache of which some layers keep sinks.

    Args:
        stream: the layers, and the forward pass that runs.
    """

    layers: list[Any]

    def __init__(self, stream: Stream) -> None:
        super().__init__(layers=stream.layers)
        self._stream = stream

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the states of new tokens and return all that their queries attend to.

        Args:
            key_states: rotated keys of the new tokens, `[batch_size, num_heads, query_length, head_dim]`.
            value_states: their values, of the same shape but for `head_dim`.
            layer_idx: the layer they belong to.

        Returns:
            Keys and values of `get_mask_sizes(query_length, layer_idx)[0]` tokens. Valid until the next update of the
            layer, which writes in place; in a chunk of `sink_prefill`, until the next update of any layer.

        Raises:
            ValueError: if batch size, heads, head dimension, dtype or device differ from what is stored, if the stream
                reaches the end of the positions, or if there are pads that nobody announced. Nothing is changed then.
            RuntimeError: if an earlier forward pass, or a change of the cache, was interrupted half-way.
        """
        stream = self._stream
        if layer_idx in stream.sink_indices:
            try:
                return stream.update(layer_idx, key_states, value_states)
            except ValueError:  # the pass was refused, and the next one is another
                stream.drop_plan()
                raise
        if layer_idx not in stream.layers_with["update"]:
            self._refuse_layer(layer_idx, key_states.shape[2])
        layer = self.layers[layer_idx]
        stream.check_like_sink_layers(layer_idx, key_states, value_states)
        return stream.run("update", layer_idx, 0, layer.update, key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many keys `update` will return for `query_length` tokens, and the position of the first key.

        Raises:
            ValueError: for a chunk so long that the sliding window of the model would hide the sinks from its end, or
                that crosses the last position at which the model behaves as at the start.
            RuntimeError: once, for a single token after a chunk that no layer stored: a model that drops the cache (or
                whoever asked only to know) looks like that.
        """
        stream = self._stream
        if layer_idx >= len(self.layers):
            self._refuse_layer(layer_idx)
        if layer_idx == 0:  # the default of transformers, which may be a layer without attention
            layer_idx = stream.first_attention_idx
        layer = self.layers[layer_idx]
        is_sink_layer = layer_idx in stream.sink_indices
        sizes: tuple[int, int] = stream.mask_sizes(query_length, layer if is_sink_layer else stream.first)
        stream.watch.note_mask()
        return sizes if is_sink_layer else super().get_mask_sizes(query_length, layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen, in a tensor if reading it would wait for the device."""
        if self._stream.has_unread_steps:
            return self._stream.first.group.count.clone()  # type: ignore[return-value]
        return self.get_seq_length(layer_idx)

    @property
    def is_compileable(self) -> bool:
        """True if the next single token gets all slots, with a mask that hides empty ones, as `torch.compile` needs it.

        That is so in a compiled model, and on devices where `generate` compiles by itself, unless single tokens have
        turned out not to be compiled.
        """
        return self._stream.expects_static_step

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        stream = self._stream
        if layer_idx not in stream.layers_with["update_indexer"]:
            self._refuse_layer(layer_idx, indexer_key_states.shape[1])
        part, layer = ("update_indexer", layer_idx, 0), self.layers[layer_idx]
        return stream.run(*part, stream.update_indexer, layer, indexer_key_states)  # type: ignore[no-any-return]

    def _refuse_layer(self, layer_idx: int, query_length: int = 0) -> NoReturn:
        """Refuse the states of a layer that the cache does not have, for `query_length` tokens."""
        stream = self._stream
        if layer_idx >= min(stream.sink_indices) and 0 < stream.first.get_seq_length() == query_length:
            stream.reset(stream.layout.positions)  # layers before this one took the prompt already
        raise layer_of_another_model(self.layers, layer_idx)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the state of a convolution.

        The model changes it in place, so this counts as a part of a forward pass. Do not call it to inspect the cache.
        """
        part, get = ("get_conv_state", layer_idx, state_idx), super().get_conv_state
        return self._stream.run(*part, get, layer_idx, state_idx)  # type: ignore[no-any-return]

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        part, update = ("update_conv_state", layer_idx, state_idx), super().update_conv_state
        return self._stream.run(*part, update, conv_states, layer_idx, state_idx, **kwargs)  # type: ignore[no-any-return]

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        part, update = ("update_recurrent_state", layer_idx, state_idx), super().update_recurrent_state
        return self._stream.run(*part, update, recurrent_states, layer_idx, state_idx, **kwargs)  # type: ignore[no-any-return]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the most tokens that the cache, or its layer `layer_idx`, holds; -1 if that is unbounded."""
        if layer_idx is None:
            return self._stream.spec.window_length
        layer = self.layers[layer_idx]
        max_length: int = layer.get_max_length() if hasattr(layer, "get_max_length") else layer.get_max_cache_shape()
        return max_length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """`get_max_length` by its name in early transformers 5."""
        return self.get_max_length(layer_idx)

    def to(
        self,
        device: Device | int | torch.dtype = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool | None = None,
    ) -> Self:
        """Move all states to another device or dtype, in place, like `torch.nn.Module.to`; return the cache.

        Call it with a model that was moved, or to put a stream aside, as in `cache.to("cpu")`. What follows is the same
        as if the stream had begun there, but for what a narrower dtype rounds.

        Args:
            device: the new device; by default the states stay where they are.
            dtype: the new dtype; by default it stays.
            non_blocking: leave it out. `accelerate` passes it where it moves the inputs of a module in a forward pass:
                a cache among these stays where its layers are.

        Raises:
            ValueError: if the device is not at hand or has no room, or the dtype is not floating. Nothing is changed.
        """
        if non_blocking is not None:
            return self
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"`dtype` must be a floating dtype, got {dtype}.")
        changes.move(self._stream, device, dtype)
        return self

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Bring back what `offload` moved to the CPU, of the first layer with attention from `layer_idx` on.

        `only_non_sliding` leaves out layers that `offload` leaves where they are.
        """
        kept = self._stream.sink_indices if only_non_sliding else self._stream.layers_with["update"]
        self.layers[min((i for i in kept if i >= layer_idx), default=min(kept))].prefetch()

    def reset(self) -> None:
        """Start a new stream, of another batch if need be, whose rows are not padded."""
        self._stream.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows: row `i` becomes a copy of row `beam_idx[i]`."""
        with self._stream.changing(IndexError):
            changes.select_rows(self._stream, "reorder_cache", beam_idx, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        check_int("repeats", repeats, at_least=1)
        with self._stream.changing():
            index = changes.row_index(self._stream).repeat_interleave(repeats)
            changes.select_rows(self._stream, "batch_repeat_interleave", repeats, index)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`."""
        indices, rows = torch.as_tensor(indices), changes.row_index(self._stream)
        if len(rows) == 0:  # nothing was fed
            return
        with self._stream.changing(IndexError):
            try:
                index = rows[indices.cpu()]
            except IndexError as error:
                raise IndexError(f"`indices` must be of the {len(rows)} rows that the cache holds: {error}.") from error
            changes.select_rows(self._stream, "batch_select_indices", indices, index)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens; a positive number is the length to keep, as in early 5.x.

        What those tokens had evicted does not come back: past the window `kept_length` falls below `window_length`
        until new tokens have filled it again. What is kept is exact.

        Raises:
            ValueError: if tokens to take back are not held any more. Nothing is changed then.
        """
        changes.crop(self._stream, tokens_to_remove)

    def deactivate_past_recording(self) -> None:
        """End what `activate_past_recording` began: updates are stored at once again."""
        changes.stop_recording(self._stream)

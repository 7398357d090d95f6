"""A KV cache of constant size: the first tokens of a stream (the attention sinks) and the most recent ones.

Storage and eviction of StreamingLLM (arXiv 2309.17453) as an immutable ring: a recent key keeps the rotation it was
born with and is never rewritten, an eviction overwrites one slot, and only the sinks are rotated forward, from a
pristine copy. Knows no model.
"""

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

try:
    from transformers.cache_utils import (
        DynamicIndexedLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
        LinearAttentionLayer,
    )
except ImportError:  # early transformers 5 has no such layers

    class _Absent(CacheLayerMixin): ...

    DynamicIndexedLayer = LinearAttentionLayer = _Absent  # type: ignore[misc,assignment]
    LinearAttentionAndFullAttentionLayer = _Absent  # type: ignore[misc,assignment]
    LinearAttentionAndSlidingWindowAttentionLayer = _Absent  # type: ignore[misc,assignment]

from . import files
from .architecture.positions import LAST_POSITION, Positions, derive_positions
from .compat import PassWatch
from .rope import Rotation
from .rows import Group, Rows, put, take

_T = TypeVar("_T")
# What a forward pass of a text comes by, and no other layer.
_FOLLOWED = (CacheLayerMixin, LinearAttentionLayer)
# What a layer holds that follows from the rest.
_DERIVED = {"rows", "rotation", "group", "place", "_single_token"}
# What differs between configs of one model, or says nothing about its states.
_OF_NO_MATTER = (
    r"^_|_token_id$|dtype|version|use_cache|architectures|label|dropout|initializer|aux_loss|return_dict|problem_type|"
    r"^output_(attentions|hidden_states|router_logits)$|^is_(encoder_)?decoder$|tokenizer|auto_map|quantization|"
    r"chunk_size_feed_forward|pretraining_tp|implementation"
)

# From here on float32 angles are off by so much that logits change by a hundredth of their scale (docs/reliability.md).
_COARSE_POSITION = 2**20

DEFAULT_WINDOW_LENGTH = 256
DEFAULT_NUM_SINK_TOKENS = 4


class SinkCache(Cache):
    """A KV cache that holds at most `window_length` tokens per layer, for streams without end.

    Positions count upwards for ever, as `generate` does it; attention sees the kept tokens as if they were contiguous.

    Args:
        config: the config of the model, `model.config`; it tells which rotation the cached keys carry.
        window_length: the most tokens a layer holds, sinks included.
        num_sink_tokens: how many of the first tokens are never evicted; `0` is plain window attention.
        rotation: how the cached keys turn with their position, for models that cannot be measured, those with code of
            their own (`trust_remote_code`) for instance. Nothing is checked then.
        attention_mask: the mask of the first prompt, `[batch_size, prompt_length]`, if rows are padded on the left.

    Layers whose own sliding window is at most `window_length` and layers without attention are those of `DynamicCache`.

    Raises:
        TypeError, ValueError: naming the argument and its value.
        NotImplementedError: naming the model type and the reason, for a model that cannot be supported exactly.

    Example:
        >>> cache = SinkCache(model.config, window_length=256, num_sink_tokens=4)
        >>> output_ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=1000)  # or cache=cache
        >>> cache.get_seq_length(), cache.kept_length
        (1008, 256)
    """

    layers: list[Any]

    # `config` is required. It has a default so that the calls of older `SinkCache`s meet our error, not Python's.
    def __init__(
        self,
        config: PreTrainedConfig = None,  # type: ignore[assignment]
        window_length: int = DEFAULT_WINDOW_LENGTH,
        num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS,
        rotation: Rotation | None = None,
        attention_mask: Tensor | None = None,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(
                f"`config` must be the config of the model, got {config!r:.80}: the rotation of the cached keys is "
                "derived from it. Call `SinkCache(model.config, window_length=256, num_sink_tokens=4)`."
            )
        _check_int("window_length", window_length, at_least=1)
        _check_int("num_sink_tokens", num_sink_tokens, at_least=0)
        if num_sink_tokens >= window_length:
            raise ValueError(
                "`num_sink_tokens` must be smaller than `window_length`, which counts them and at least one recent "
                f"token; got num_sink_tokens={num_sink_tokens} and window_length={window_length}."
            )
        if not isinstance(rotation, Rotation | None):
            raise TypeError(f"`rotation` must be a Rotation, got {rotation!r:.80}.")
        if config.is_encoder_decoder:
            raise NotImplementedError(
                f"SinkCache does not support the model type {config.model_type!r}: it is an encoder-decoder model."
            )
        config = config.get_text_config(decoder=True)
        try:
            layers: list[Any] = DynamicCache(config=config).layers
        except Exception as error:
            raise NotImplementedError(
                f"SinkCache does not support the model type {config.model_type!r}: not even a DynamicCache can be made "
                f"from its config ({type(error).__name__}: {error})."
            ) from error
        ring_layers = [i for i, layer in enumerate(layers) if _becomes_ring(layer, i, config, window_length)]
        if not any(isinstance(layer, DynamicLayer) for layer in layers):
            raise NotImplementedError(
                f"SinkCache does not support the model type {config.model_type!r}: it has no attention layers, and its "
                "memory is constant without any help."
            )
        if not ring_layers:
            raise ValueError(
                f"`window_length` must be smaller than the sliding window of the model; with {window_length} no layer "
                f"of this {config.model_type!r} model would keep a sink. Choose a smaller one, or use a `DynamicCache`."
            )
        if rotation is None:
            positions = derive_positions(config, ring_layers)
        else:
            if any(isinstance(layers[i], DynamicIndexedLayer) for i in ring_layers):
                raise NotImplementedError(
                    f"`rotation` cannot say how the indexers of this {config.model_type!r} model turn; leave it out."
                )
            positions = Positions(dict.fromkeys(ring_layers, rotation))
        if positions.limit <= window_length:
            raise ValueError(
                f"`window_length` must be below {positions.limit}, where this {config.model_type!r} model ends or "
                f"changes its behaviour, got {window_length}."
            )
        # Text reaches no others: they are for images, or no attention at all.
        for_images = {*ring_layers} - positions.rotations.keys()
        reached = [i for i, layer in enumerate(layers) if isinstance(layer, _FOLLOWED) and i not in for_images]
        ring_layers = list(positions.rotations)
        # A ring in the place of a sliding layer still gets the mask of the sliding window.
        self._sliding_window = min(getattr(layers[i], "sliding_window", torch.inf) for i in ring_layers)
        # Where positions end the model must be asked at every step whether they have. Flash attention is given no mask
        # that would hide empty slots.
        compiles = positions.limit >= LAST_POSITION and not positions.needs_temporal_order
        compiles &= config._attn_implementation in (None, "eager", "sdpa", "flex_attention")
        for i, layer in enumerate(layers):
            plain = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
            compiles &= plain if i in ring_layers else layer.is_compileable
        # An indexer that pools the keys of neighbours is given positions that know no padding.
        self._masked = positions.masked and not (positions.indexers and positions.needs_temporal_order)
        self._config = config
        self._model_type = config.model_type
        # Chunked layers keep their class, and tokens for longer than a ring.
        windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
        sliding = self._sliding_window < torch.inf
        self.rows = Rows(window_length, num_sink_tokens, compiles, sliding, max(window_length, *windows, 1))
        self.rows.restart(self._checked_pads(attention_mask))
        for i in ring_layers:
            ring = self.rows, positions.rotations[i], positions.needs_temporal_order
            if isinstance(layers[i], LinearAttentionLayer):
                layers[i] = HybridSinkLayer(*ring, number_of_states=layers[i].number_of_states)
            elif isinstance(layers[i], DynamicIndexedLayer):
                layers[i] = IndexedSinkLayer(*ring, positions.indexers.get(i))
            else:
                layers[i] = SinkLayer(*ring)
        super().__init__(layers=layers)
        self.window_length = window_length
        self.num_sink_tokens = num_sink_tokens
        self._first_ring: SinkLayer = layers[ring_layers[0]]
        self._last_ring: SinkLayer = layers[ring_layers[-1]]
        self._measured = rotation is None
        self.position_limit = positions.limit
        self._rebasable = positions.rebasable
        self._followers = frozenset(ring_layers[1:])
        self._reached = [layers[i] for i in reached]
        self._last_layer = reached[-1]
        self.watch = PassWatch()
        self._begin_stream()
        # `generate` puts all pads at position 0, so that their states are equal; where states rotate, no others are.
        self._padding_guard = next((i for i, rotation in positions.rotations.items() if rotation is not None), None)

    def _checked_pads(self, attention_mask: Tensor | None) -> Tensor | None:
        pads = _count_pads(attention_mask)
        if pads is not None and not self._masked:
            raise NotImplementedError(
                f"`attention_mask` must not have padding: this {self._model_type!r} model builds its attention from "
                "the number of all tokens seen. Generate for prompts of equal length together, or one by one."
            )
        return pads

    @property
    def kept_length(self) -> int:
        """How many tokens are held now: `min(seen, window_length)`, or fewer after a `crop`."""
        return self._first_ring.kept_length

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
            layer, which writes in place.

        Raises:
            ValueError: if batch size, heads, head dimension, dtype or device differ from what is stored, if the stream
                reaches the end of the positions, or if the first prompt is left-padded. Nothing is changed then.
            RuntimeError: if an earlier forward pass, or a change of the cache, was interrupted half-way.
        """
        layer = self.layers[layer_idx]
        if layer is self._first_ring:
            if torch.compiler.is_compiling():
                self.watch.moved = True
            else:
                self.watch.begin_pass(key_states.shape[2])
        # What concerns a whole step is checked before its first ring, and not again.
        if key_states.shape[2] != 1 or layer_idx not in self._followers or not layer.is_initialized:
            self._check_update(key_states, value_states, layer_idx)
        change = functools.partial(layer.update, key_states, value_states, *args, **kwargs)
        returned: tuple[Tensor, Tensor] = self._in_pass(("update", layer_idx, 0), change)
        if layer is self._last_ring and not torch.compiler.is_compiling():
            self.rows.eager_tokens = self.rows.eager_tokens + 1 if key_states.shape[2] == 1 else 0
        return returned

    # A forward pass comes by the layers in their order. It ends without a word, and so does one that an exception ends
    # half-way: that shows at the next one, which begins again before the last layer was reached.

    def _begin_stream(self) -> None:
        self._layer_reached = self._last_layer
        self._done: set[tuple[str, int, int]] = set()
        self._warned = False

    def _in_pass(self, part: tuple[str, int, int], change: Callable[[], _T]) -> _T:
        """Make a change of a layer, unless it begins a pass after one that did not end."""
        if torch.compiler.is_compiling():
            return change()
        layer_idx = part[1]
        if layer_idx < self._layer_reached or part in self._done or self.rows.changing:
            self._check_whole()
            self._done.clear()
        # `changes`, in a form that a step can afford.
        self.rows.changing = True
        try:
            changed = change()
        except ValueError:
            self.rows.changing = False
            raise
        self._layer_reached = layer_idx
        self._done.add(part)
        self.rows.changing = False
        return changed

    def _check_whole(self) -> None:
        """Raise if a forward pass, or a change, was interrupted, so that layers do not belong together any more."""
        if self.rows.changing:
            what = "while the states of a layer were changed"
        elif self._layer_reached != self._last_layer:
            what = f"between layer {self._layer_reached} and layer {self._last_layer}"
        elif self._lacks_recurrent_state():
            what = f"in layer {self._last_layer}"
        elif len(seen := {layer.get_seq_length() for layer in self._counting()}) > 1:
            what = f"between two layers: they have seen {' and '.join(map(str, sorted(seen)))} tokens"
        else:
            return
        raise RuntimeError(
            f"A forward pass was interrupted {what}. Start a new stream with `reset()`. (Or one runs now, in another "
            "thread; or some layers of the model are compiled and others are not: compile all of it.)"
        )

    def _lacks_recurrent_state(self) -> bool:
        """Whether the last layer, if it is one with linear attention, did not store its state as others did."""
        stored = {layer_idx for name, layer_idx, _ in self._done if name == "update_recurrent_state"}
        return bool(stored) and isinstance(self._reached[-1], LinearAttentionLayer) and self._last_layer not in stored

    def _counting(self) -> Iterator[CacheLayerMixin]:
        for layer in self._reached:
            if isinstance(layer, CacheLayerMixin):
                yield layer
            if isinstance(layer, IndexedSinkLayer) and layer.indexer.is_initialized:  # some share that of another
                yield layer.indexer

    @contextlib.contextmanager
    def _changing(self, *refusals: type[Exception]) -> Iterator[None]:
        """Inside, all layers are changed. If that is interrupted the next call says so, unless the first refused it."""
        self._check_whole()
        with self.rows.changes(*refusals):
            yield

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        change = functools.partial(super().update_indexer, indexer_key_states, layer_idx)
        return self._in_pass(("update_indexer", layer_idx, 0), change)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state of a convolution, which a model changes in place: part of a forward pass, not for a look at it."""
        change = functools.partial(super().get_conv_state, layer_idx, state_idx)
        return self._in_pass(("get_conv_state", layer_idx, state_idx), change)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        change = functools.partial(super().update_conv_state, conv_states, layer_idx, state_idx, **kwargs)
        return self._in_pass(("update_conv_state", layer_idx, state_idx), change)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        change = functools.partial(super().update_recurrent_state, recurrent_states, layer_idx, state_idx, **kwargs)
        return self._in_pass(("update_recurrent_state", layer_idx, state_idx), change)

    def _check_update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> None:
        layer, ring, batch_size = self.layers[layer_idx], self._first_ring, key_states.shape[0]
        if not isinstance(layer, SinkLayer) and ring.is_initialized:
            # A layer of another kind may come first, and would take what the rings refuse.
            stored, dtype = ring.keys.shape[0], ring.keys.dtype
            if batch_size != stored or key_states.dtype != dtype:
                raise ValueError(
                    f"`key_states` must keep batch size and dtype, {stored} and {dtype}, got the shape "
                    f"{[*key_states.shape]} in {key_states.dtype}. Call `reset()`, or use a new cache, to change them."
                )
        if torch.compiler.is_compiling() and ring.takes_step(key_states.shape[2]) and self.rows.masked_for_step:
            return  # it cannot read how many tokens were seen
        self._check_lowered()
        seen = layer.get_seq_length()
        self._check_limit(seen, key_states.shape[2])
        if self.rows.pads is not None and len(self.rows.pads) != batch_size and not ring.is_initialized:
            # Beams and several answers to a prompt repeat its row.
            repeats, rest = divmod(batch_size, len(self.rows.pads))
            if rest != 0:
                raise ValueError(
                    f"`attention_mask` must have a row for each of the {batch_size} sequences, or for each group of "
                    f"equal length, got {len(self.rows.pads)}."
                )
            self.rows.map_batch(lambda pads: pads.repeat_interleave(repeats))
        unannounced = layer_idx == self._padding_guard and seen == 0 and self.rows.pads is None
        if unannounced and _starts_with_pads(key_states, value_states):
            self.reset()  # layers before this one took the prompt already
            raise ValueError(
                "`key_states` start with two equal tokens, as only padding does. Tell the cache of it: "
                "`SinkCache(config, ..., attention_mask=attention_mask)`, or call `sink_generate`, which does."
            )

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many keys `update` will return for `query_length` tokens, and the position the mask counts them from.

        Raises:
            ValueError: for a chunk so long that the model's own sliding window would hide the sinks from its end, or
                that crosses the last position at which the model behaves as at the start.
        """
        self._check_lowered()
        if not torch.compiler.is_compiling():
            self.watch.mask_asked = True
        steps = self.rows.masked_for_step = self._first_ring.announces_step(query_length)
        if steps and not torch.compiler.is_compiling():
            self.rows.announced += 1
        if not steps or (not torch.compiler.is_compiling() and self.positions_left() < query_length):
            self._check_limit(self._first_ring.num_seen, query_length)
        kv_length, kv_offset = super().get_mask_sizes(query_length, layer_idx)
        if kv_length > self._sliding_window and kv_length > query_length:
            raise ValueError(
                f"`query_length` must be at most {self._sliding_window - kv_length + query_length} with "
                f"{kv_length - query_length} tokens in the cache, got {query_length}: the sliding window of the model "
                f"({self._sliding_window}) would hide the sinks. Feed the tokens in smaller chunks."
            )
        return kv_length, kv_offset

    def _check_lowered(self) -> None:
        if self.rows.base > 0 and not self.rows.lowered:
            raise ValueError(
                f"The cache counts positions from {self.rows.base} tokens on, since `sink_generate` wound them "
                "back. Continue it with `sink_generate` or `sink_prefill`."
            )

    def _check_limit(self, seen: int, query_length: int) -> None:
        left = self.positions_left(seen)
        if query_length > left:
            raise ValueError(
                f"`query_length` must be at most {left} after {seen} tokens, got {query_length}: the model ends or "
                f"changes its behaviour at position {self.position_limit}. Call `sink_generate`, which winds positions "
                "back where the model allows it, or start a new stream with `reset()`."
            )
        if self.position_limit - left >= _COARSE_POSITION and not self._warned:
            self._warned = True
            warnings.warn(
                f"The stream is at position {self.position_limit - left}: models compute angles in float32, and there "
                "their roundings begin to show in the logits. "
                + (
                    "Call `sink_generate`, which winds positions back, or, in a loop of your own, `compact()` at times."
                    if self.can_rebase
                    else "The positions of this model cannot be wound back; start a new stream with `reset()`."
                ),
                stacklevel=2,
            )

    def announce_padding(self, attention_mask: Tensor) -> None:
        """Tell an empty cache of the padding of the first prompt, `[batch_size, prompt_length]`.

        Raises:
            ValueError: if the mask is not padded on the left, or if the cache is not empty.
        """
        if self.get_seq_length() > 0:
            raise ValueError("`attention_mask` must be announced before the first prompt. Call `reset()` first.")
        pads = self._checked_pads(attention_mask)
        self.reset()
        self.rows.restart(pads)

    @contextlib.contextmanager
    def lowers_positions(self) -> Iterator[None]:
        """Inside, the model is given positions that are `position_offsets` lower."""
        before = self.rows.lowered
        try:
            self.rows.lowered = True
            yield
        finally:
            self.rows.lowered = before

    @contextlib.contextmanager
    def windows(self, windowed: bool) -> Iterator[None]:
        """Whether the update inside returns what lets every query of a chunk see exactly its own window."""
        try:
            self.rows.windowed = windowed
            yield
        finally:
            self.rows.windowed = False

    def positions_left(self, seen: int | None = None) -> int:
        """How many tokens can follow the `seen` ones before the model ends or changes its behaviour.

        Without `seen` it may be too few by those that `get_mask_sizes` announced, and reading it never waits for the
        device.
        """
        seen = self._first_ring.seen_at_most if seen is None else seen
        # The row with the fewest pads is the furthest.
        least_pads = self.rows.least_pads
        return self.position_limit - (seen - least_pads - max(self.rows.base - least_pads, 0))

    def deactivate_past_recording(self) -> None:
        """End what `activate_past_recording` began: updates are stored at once again."""
        with self._changing():
            for layer in self.layers:
                if isinstance(layer, SinkLayer):
                    layer.deactivate_past_recording()
                if getattr(layer, "record_past", False):
                    if self.get_seq_length() > 0:
                        layer.crop(0)  # cuts what it recorded
                    layer.record_past = False

    @property
    def ends(self) -> bool:
        """Whether the positions of the model end, or change their meaning, before float32 does."""
        return self.position_limit < LAST_POSITION

    @property
    def can_rebase(self) -> bool:
        """Whether positions can be wound back: the model reads them from `position_ids`, and all layers are rings."""
        if any(isinstance(layer, IndexedSinkLayer) and layer.in_order for layer in self.layers):
            return False  # what pools the keys of neighbours is given positions by the cache
        return self._rebasable and all(
            isinstance(layer, SinkLayer) or not hasattr(layer, "keys") for layer in self.layers
        )

    def rebase(self) -> None:
        """Wind the positions of all kept tokens back by the number of evicted ones.

        From then on `position_ids` must be given to the model `position_offsets` lower. Attention sees no difference.

        Raises:
            NotImplementedError: if the model counts positions by itself or has layers that cannot be wound back.
        """
        self._check_rebasable()
        with self._changing():
            self._rebase()

    def _check_rebasable(self) -> None:
        if not self.can_rebase:
            raise NotImplementedError(
                "The positions of this model cannot be wound back: it does not read them from `position_ids` alone, or "
                "has attention layers that are no rings. Start a new stream with `reset()`."
            )

    def _rebase(self) -> None:
        shift = self._first_ring.shift_of(self._first_ring.num_seen)
        for ring in self._rings():
            ring.rebase(shift)
        self.rows.set_base(shift)

    def compact(self) -> None:
        """Count the kept tokens as all that was ever seen: `get_seq_length()` becomes `kept_length`.

        Positions begin anew, at those of the kept tokens, so that nothing that counts a stream without end has to grow.
        Attention sees no difference. The states are rounded once, as by `rebase`.

        Raises:
            NotImplementedError: if positions cannot be wound back, see `rebase`.
        """
        self._check_rebasable()
        with self._changing():
            self._rebase()
            shift = self.rows.base
            for ring in self._rings():
                ring.order_slots()
            self.rows.forget(shift)
            for ring in self._rings():
                ring.forget(shift)

    def _rings(self) -> Iterator["SinkLayer"]:
        for layer in self.layers:
            if isinstance(layer, SinkLayer):
                yield layer
            if isinstance(layer, IndexedSinkLayer):
                yield layer.indexer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the stream to a safetensors file, from which `load` resumes it: what follows is bitwise the same.

        An old file of that name is replaced at once and by a whole one only, even if the process is killed meanwhile.

        Args:
            path: of the file, about as large as the cache. With tensor parallelism, one for each process.

        Raises:
            RuntimeError: if a forward pass was interrupted half-way, so that there is nothing to resume, or runs now.
            OSError: if the file cannot be written.
        """
        files.write(path, "cache", self.state())

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: PreTrainedConfig, device: str | torch.device | None = None
    ) -> Self:
        """The cache that `save` wrote, to go on where it was.

        Args:
            path: of the file.
            config: the config of the model, which must be the one that the stream was made with. Its weights are not
                compared here; `SinkSession.load` compares them.
            device: where the states go; by default, layer for layer, to the devices they were on.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, damaged, of another program or a newer version, if the stream belongs
                to another model (naming what differs), or if a device is not at hand.

        Example:
            >>> cache.save("stream.safetensors")
            >>> cache = SinkCache.load("stream.safetensors", model.config)
        """
        return cls.from_state(files.read(path, "cache"), config, device)

    def state(self) -> dict[str, Any]:
        """All that the stream is, in plain values and tensors; what layers hold is copied to the CPU."""
        self._check_whole()
        seen = self.get_seq_length()
        state = {
            "config": json.loads(self._config.to_json_string(use_diff=False)),
            "window_length": self.window_length,
            "num_sink_tokens": self.num_sink_tokens,
            "rotations": [None if ring.rotation is None else vars(ring.rotation) for ring in self._rings()],
            "measured": self._measured,
            "pads": self.rows.pads,
            "base": self.rows.base,
            "eager_tokens": self.rows.eager_tokens,
            "layers": [_state_of(layer) for layer in self.layers],
            "process": self._process_of_heads(),
        }
        self._check_whole()
        if self.get_seq_length() != seen:
            raise RuntimeError("A forward pass ran while the stream was saved. Save it between two of them.")
        return state

    def _process_of_heads(self) -> list[int] | None:
        """Which process of how many this is, if each holds some of the heads (tensor parallelism)."""
        heads = getattr(self._config, "num_key_value_heads", None)
        ring = self._first_ring
        shared = ring.is_initialized and isinstance(heads, int) and 1 <= ring.keys.shape[1] < heads
        if not (shared and torch.distributed.is_available() and torch.distributed.is_initialized()):
            return None
        return [torch.distributed.get_rank(), torch.distributed.get_world_size()]

    @classmethod
    def from_state(
        cls, state: dict[str, Any], config: PreTrainedConfig, device: str | torch.device | None = None
    ) -> Self:
        """A cache in the state that another one was in; see `load`."""
        if isinstance(config, PreTrainedConfig):  # anything else is refused below
            text_config = config.get_text_config(decoder=True)
            ours = json.loads(text_config.to_json_string(use_diff=False))
            for name in sorted(state["config"].keys() & ours.keys()):
                if ours[name] != state["config"][name] and not re.search(_OF_NO_MATTER, name):
                    raise ValueError(
                        f"`config` must be that of the model whose stream was saved: {name} was "
                        f"{state['config'][name]!r:.80}, got {ours[name]!r:.80}."
                    )
        saved = [None if rotation is None else Rotation(**rotation) for rotation in state["rotations"]]
        by_hand = None if state["measured"] else next((rotation for rotation in saved if rotation is not None), None)
        cache = cls(config, state["window_length"], state["num_sink_tokens"], by_hand)
        rings, kinds = list(cache._rings()), [layer["kind"] for layer in state["layers"]]
        if (
            kinds != [type(layer).__name__ for layer in cache.layers]
            or len(rings) != len(saved)
            or not all(_turn_alike(ring.rotation, rotation) for ring, rotation in zip(rings, saved, strict=True))
        ):
            raise ValueError(
                f"`config` is that of the {cache._model_type!r} model whose stream was saved, but this version of "
                "transformers caches its states in another form. Load the stream with the version that it was saved "
                f"with, {state['config'].get('transformers_version')}."
            )
        with torch.inference_mode(False):
            cache.rows.restart(state["pads"])
            for layer, layer_state in zip(cache.layers, state["layers"], strict=True):
                _restore(layer, layer_state, device)
                for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
                    cache.rows.fix_address(*(state for state in states.values() if state is not None))
            for ring in rings:
                if ring.is_initialized:
                    ring.join_group()
                    ring.seen = ring._seen
            cache.rows.set_base(state["base"])
        cache.rows.eager_tokens = state["eager_tokens"]
        if state["process"] not in (None, cache._process_of_heads()):
            rank, processes = state["process"]
            raise ValueError(
                f"`path` must be a file that this process saved: it has the heads of process {rank} of {processes}. "
                "Save a file for each process."
            )
        return cache

    @property
    def num_rows(self) -> int:
        """How many rows of a batch are stored, 0 before the first prompt."""
        return self._first_ring.keys.shape[0] if self._first_ring.is_initialized else 0

    @property
    def position_offsets(self) -> int | Tensor:
        """How far positions were wound back, for all rows or for each one, `[batch_size]`."""
        return self.rows.offsets()

    @property
    def is_compileable(self) -> bool:
        """Whether a single token gets all slots, with a mask that hides empty ones, as `torch.compile` wants it.

        So it is in a compiled model, and on devices where `generate` compiles by itself, unless single tokens have
        turned out not to be compiled.
        """
        ring = self._first_ring
        return ring.announces_step(1) if ring.is_initialized else self.rows.announces_step

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The number of tokens seen, in a tensor if reading it would wait for the device."""
        if not torch.compiler.is_compiling() and self.rows.stale:
            return self._first_ring.group.count  # type: ignore[return-value]
        return self.get_seq_length(layer_idx)

    @property
    def can_window(self) -> bool:
        """Whether chunks can be read with a window for each of their tokens: all layers are plain rings."""
        return all(type(layer) is SinkLayer and not layer.in_order for layer in self.layers)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The most tokens that the cache, or its layer `layer_idx`, holds; -1 if that is unbounded."""
        if layer_idx is None:
            return self.window_length
        layer = self.layers[layer_idx]
        max_length: int = layer.get_max_length() if hasattr(layer, "get_max_length") else layer.get_max_cache_shape()
        return max_length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """`get_max_length` by its name in early transformers 5."""
        return self.get_max_length(layer_idx)

    def reset(self) -> None:
        """Start a new stream, of another batch if need be, whose rows are not padded."""
        # Before they would be zeroed: states of inference mode cannot be, outside of it.
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):  # it would keep tensors of the old batch
                LinearAttentionLayer.__init__(layer, number_of_states=layer.number_of_states)
            if isinstance(layer, DynamicLayer):  # one that is no ring may keep states, and go on recording
                layer.keys = layer.values = None
                layer.is_initialized = layer.record_past = False  # type: ignore[attr-defined]
        super().reset()  # type: ignore[no-untyped-call]
        self.rows.restart(None)
        self._begin_stream()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows in the place of others: row `i` becomes a copy of row `beam_idx[i]`."""
        with self._changing(IndexError):
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]
            self.rows.map_batch(lambda pads: pads.index_select(0, beam_idx.to(pads.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        _check_int("repeats", repeats, at_least=1)
        with self._changing():
            self._map_batch("batch_repeat_interleave", repeats, lambda states: states.repeat_interleave(repeats, dim=0))
            self.rows.map_batch(lambda pads: pads.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`."""
        indices = torch.as_tensor(indices)
        with self._changing(IndexError):
            self._map_batch("batch_select_indices", indices, lambda states: states[indices])
            self.rows.map_batch(lambda pads: pads[indices.to(pads.device)])

    def _map_batch(self, name: str, argument: Any, function: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            if hasattr(layer, name):
                getattr(layer, name)(argument)
            if isinstance(layer, LinearAttentionLayer) and not isinstance(layer, SinkLayer):
                _map_linear(layer, function)  # transformers leaves these as they are

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens; a positive number is the length to keep, as in early 5.x.

        What those tokens had evicted does not come back: past the window `kept_length` falls below `window_length`
        until new tokens have filled it again. What is kept is exact.

        Raises:
            ValueError: if tokens to take back are not held any more. Nothing is changed then.
        """
        ring = self._first_ring
        seen = ring.get_seq_length()
        removed = seen - ring.length_after_crop(tokens_to_remove)
        for i, layer in enumerate(self.layers):
            if removed > 0 and not _can_take_back(layer, removed):
                raise ValueError(
                    f"`tokens_to_remove` cannot be {tokens_to_remove}: layer {i}, a {type(layer).__name__}, does not "
                    f"hold what it would need with {removed} tokens less. Call `activate_past_recording()` before "
                    "tokens that may be taken back; a linear attention has no way back."
                )
        with self._changing():
            for layer in self.layers:
                # Others read 0 as a length in early 5.x, and as a call to forget what they recorded later.
                if removed > 0 or (seen > 0 and getattr(layer, "record_past", False)):
                    layer.crop(-removed)


class SinkLayer(CacheLayerMixin):
    """One layer of a `SinkCache`: the sinks in the first slots of a buffer, a ring of recent tokens in the others.

    Token `t` lies in slot `t` if it is a sink and in slot `S + (t - S) % (W - S)` otherwise (W = `window_length`,
    S = `num_sink_tokens`). `seen` tokens were fed, `shift` of them were evicted, those from S on; the sinks act `shift`
    positions further on than they were born. For the rows of a padded batch see `Rows`.

    Most updates count in Python. A single token for a full ring, and any in a compiled model, is taken by `_step`.

    Args:
        rows: what the layers of a cache share.
        rotation: how the cached states turn; None if they carry no position.
        in_order: whether the tokens are always handed on in the order of their positions.
    """

    # None before the first update.
    keys: Tensor
    values: Tensor
    sinks: Tensor
    group: Group
    dtype: Any
    device: Any
    is_sliding = False

    def __init__(self, rows: "Rows", rotation: Rotation | None, in_order: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self.rows = rows
        self.window_length = rows.window_length
        self.num_sink_tokens = rows.num_sink_tokens
        self.rotation = rotation
        self.in_order = in_order
        SinkLayer.reset(self)

    def reset(self) -> None:
        # The buffers are dropped, not zeroed, so that the next stream may have another batch size, dtype or device.
        self.keys = self.values = self.sinks = self.group = None  # type: ignore[assignment]
        self.is_initialized = False
        self._seen = 0
        self._cropped = 0  # how many tokens were evicted when some were taken back: no fewer are from then on
        self.record_past = False
        self._recorded: tuple[Tensor, Tensor] | None = None  # the last states, not stored before the next call

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """True while updates are recorded: then `crop` leaves no trace past the window either."""
        return self.record_past

    @property
    def seen(self) -> int:
        if self.rows.stale:
            self.rows.settle()
        return self._seen

    @seen.setter
    def seen(self, seen: int) -> None:
        self._seen = seen
        if self.group is not None:
            self.group.begun = None
            self.group.count.fill_(seen)
        if self is self.rows.last_ring:  # what all rings have in common changes between steps only
            self.rows.all_sinks_born = self.rows.all_sinks_seen(seen)
            self.rows.has_gap = self._cropped > max(seen + 1 - self.window_length, 0)

    @property
    def seen_at_most(self) -> int:
        """`num_seen`, or a little more if reading it would wait for the device."""
        # One more, if Python asked after a step was announced.
        return self._seen + self.rows.announced + 1 if self.rows.stale else self.num_seen

    @property
    def shift(self) -> int:
        return self.shift_of(self.seen)

    @property
    def kept_length(self) -> int:
        return min(self.get_seq_length() - self.shift, self.window_length)

    def get_seq_length(self) -> int:
        if torch.compiler.is_compiling() and self.takes_step(1):
            return self.group.count  # type: ignore[return-value]
        return self.num_seen

    @property
    def num_seen(self) -> int:
        """How many tokens were seen, those that `crop` may still take back included."""
        return self.seen + (0 if self._recorded is None else self._recorded[0].shape[2])

    def get_max_length(self) -> int:
        return self.window_length

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.announces_step(query_length):
            if self.rows.pads is None and not self.rows.sliding:
                # Of slots in the order of their tokens causality hides the empty ones, and of a full ring none.
                return self.window_length, 0
            if torch.compiler.is_compiling():
                offset = (self.group.count + 1 - self.window_length).clamp(min=0)
                return self.window_length, offset  # type: ignore[return-value]
            return self.window_length, max(self.seen + 1 - self.window_length, 0)
        seen = self.num_seen
        if self.rows.windowed:
            kv_length = self.rows.windowed_length(seen, query_length)
            return kv_length, seen + query_length - kv_length
        kv_offset = self.shift_of(seen + min(query_length, 1))
        return seen + query_length - kv_offset, kv_offset

    def shift_of(self, seen: int) -> int:
        """The number of evicted tokens once `seen` were fed."""
        return max(self._cropped, seen - self.window_length)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Not inside inference mode: its tensors could not be written to outside of it later.
        with torch.inference_mode(False):
            self.keys = _empty_slots(key_states, self.window_length)
            self.values = _empty_slots(value_states, self.window_length)
            if self.rotation is not None:
                sinks = self.turning(self.keys, self.values)[:, :, : self.num_sink_tokens]
                # Half-precision states are turned in float32 and rounded once, in their slots.
                self.sinks = sinks.to(torch.promote_types(sinks.dtype, torch.float32), copy=True)
            self.join_group()
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def join_group(self) -> None:
        """Take steps together with the other rings, from now on with these buffers."""
        self.group = self.rows.group_of(self)
        self.place = len(self.group.rings) - 1
        self._hold()

    def _hold(self) -> None:
        self.rows.fix_address(self.keys, self.values, *([] if self.rotation is None else [self.sinks]))
        keys, values = self.keys[:, :, :1], self.values[:, :, :1]
        self._single_token = keys.shape, values.shape, keys.dtype, values.dtype, keys.device

    def takes_step(self, query_length: int) -> bool:
        """Whether so many new tokens are taken by `_step`."""
        if query_length != 1 or not self.is_initialized:
            return False
        compiling = torch.compiler.is_compiling()
        if not compiling and self.group.begun == self._seen:
            return True  # the first ring does
        if self.in_order or self.record_past or self.rows.windowed:
            return False
        if self.rows.announces_step:
            return True
        return not compiling and self.seen + 1 - self.window_length >= self._cropped

    def announces_step(self, query_length: int) -> bool:
        """Whether so many new tokens get all slots, full or not, as they do in a compiled model."""
        return self.rows.announces_step and self.takes_step(query_length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        query_length = key_states.shape[2]
        if self.takes_step(query_length) and (self.rows.masked_for_step or not torch.compiler.is_compiling()):
            # The same checks as below, in a form that a step can afford.
            like = key_states.shape, value_states.shape, key_states.dtype, value_states.dtype, key_states.device
            if like != self._single_token:
                self._check_like_first(key_states, value_states)
            return self._step(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_like_first(key_states, value_states)
        self._store_recorded()
        if self.rows.windowed:
            return self._windowed(key_states, value_states)
        # The shift of the first query counts for all of them; see get_mask_sizes.
        shift = self.shift_of(self.seen + min(query_length, 1))
        # Views would be written over before a backward pass reads them. Under autograd the new states are handed on
        # themselves, the kept ones as constants.
        seen = self.seen + query_length
        if seen <= self.window_length and shift == 0 and not (torch.is_grad_enabled() or self.record_past):
            self._take(key_states, value_states)
            return self.keys[:, :, :seen], self.values[:, :, :seen]
        returned = self._joined(self.keys, key_states, shift), self._joined(self.values, value_states, shift)
        if self.record_past:
            self._recorded = key_states.detach(), value_states.detach()
        else:
            self._take(key_states, value_states)
        return returned

    def _step(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Take one token over the oldest recent one, or into an empty slot, and turn the sinks: all slots, as they lie.

        What depends on the number of tokens is in tensors, so that a compiled model is compiled once.
        """
        group, rows = self.group, self.rows
        if self.place == 0:
            group.begin(self._seen)
        slot = group.slot()
        if not rows.all_sinks_born and self.rotation is not None:
            is_new = rows.sink_slots(slot.device) == slot
            born = self.turning(key_states, value_states).detach()
            self.sinks.copy_(torch.where(is_new[..., None, :, None], born, self.sinks))
            group.forget_sinks()
        keys, values = self.keys, self.values
        if torch.is_grad_enabled():
            # A backward pass must not read what later tokens are written over.
            keys, values = put(keys.clone(), slot, key_states), put(values.clone(), slot, value_states)
            key_states, value_states = key_states.detach(), value_states.detach()
        put(self.keys, slot, key_states)
        put(self.values, slot, value_states)
        if not torch.compiler.is_compiling():
            self._seen += 1
        return keys, values

    def _joined(self, slots: Tensor, states: Tensor, shift: int) -> Tensor:
        """The held tokens, without the first `shift` that are no sinks, and new ones, in order."""
        device, num_sinks = slots.device, min(self.num_sink_tokens, self.seen)
        sinks = slots[:, :, :num_sinks]
        turns = self.rotation is not None and shift > 0 and slots is self.turning(self.keys, self.values)
        if self.rotation is not None and turns:
            turned = self.rotation.rotate_by(self.rows.phase(self.rotation, shift, self.sinks), self.sinks)
            sinks = turned.to(slots.dtype)
        if self.rows.pads is not None:
            if turns:
                slots = put(slots.clone(), self.rows.sink_slots(device), sinks)
            held = self.rows.ordered_slots(self.seen, self.seen - shift, device)
            return torch.cat([take(slots, held), states], dim=2)
        return torch.cat([sinks, *self._recent(slots, max(self.seen - shift - num_sinks, 0)), states], dim=2)

    def _recent(self, slots: Tensor, length: int) -> list[Tensor]:
        """The last `length` tokens in order, as views."""
        if self.rows.pads is not None:
            return [take(slots, self.rows.recent_slots(self.seen, length, slots.device))]
        first = self.seen - length
        num_sinks = min(max(self.num_sink_tokens - first, 0), length)
        start = self.rows.slot(first + num_sinks)
        wrapped = max(start + length - num_sinks - self.window_length, 0)
        return [
            slots[:, :, first : first + num_sinks],
            slots[:, :, start : start + length - num_sinks - wrapped],
            slots[:, :, self.num_sink_tokens : self.num_sink_tokens + wrapped],
        ]

    def _windowed(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """What `Rows.windowed` asks for: the sinks once per query, each copy turned for its query, then the rest."""
        seen, query_length = self.seen, key_states.shape[2]
        recent = self.rows.windowed_recent(seen)
        kept = self._recent(self.keys, recent), self._recent(self.values, recent)
        # Sinks may be among the new tokens. Then nothing evicts what was kept, or it was copied.
        all_seen = self.rows.all_sinks_seen(seen)
        if not all_seen:
            self._take(key_states, value_states)
        copies = []
        for slots in (self.keys, self.values):
            if self.rotation is not None and slots is self.turning(self.keys, self.values):
                phase = self.rows.windowed_phase(self.rotation, seen, query_length, self.sinks)
                each = self.sinks[:, :, None].expand(-1, -1, query_length, -1, -1)
                sinks = self.rotation.rotate_by(phase, each).to(slots.dtype)
            else:
                sinks = take(slots, self.rows.sink_slots(slots.device))[:, :, None].expand(-1, -1, query_length, -1, -1)
            copies.append(sinks.flatten(2, 3))
        keys = torch.cat([copies[0], *kept[0], key_states], dim=2)
        values = torch.cat([copies[1], *kept[1], value_states], dim=2)
        if all_seen:
            self._take(key_states, value_states)
        return keys, values

    def _check_like_first(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.shape[::2][:2] != value_states.shape[::2][:2]:
            raise ValueError(
                "`key_states` and `value_states` must agree in batch size and number of tokens, got the shapes "
                f"{[*key_states.shape]} and {[*value_states.shape]}."
            )
        for name, states, slots in (("key_states", key_states, self.keys), ("value_states", value_states, self.values)):
            if states.shape[:2] != slots.shape[:2] or states.shape[3:] != slots.shape[3:]:
                raise ValueError(
                    f"`{name}` must keep batch size, heads and head dimension, {[*slots.shape[:2], slots.shape[3]]}, "
                    f"got the shape {[*states.shape]}. Call `reset()`, or use a new cache, for another batch."
                )
            if states.dtype != slots.dtype or states.device != slots.device:
                raise ValueError(
                    f"`{name}` must keep dtype and device, {slots.dtype} on {slots.device}, got {states.dtype} on "
                    f"{states.device}. Call `reset()`, or use a new cache, to change them."
                )

    def rebase(self, shift: int) -> None:
        """Wind all states back, so that the first `shift` evicted tokens are no part of their positions any more."""
        self._store_recorded()
        if self.rotation is not None and self.is_initialized:
            slots = self.turning(self.keys, self.values)
            for slot in slots.split(1024, dim=2):  # in pieces, for the memory that float32 takes
                cos, sin = self.rows.phase(self.rotation, shift, self.sinks)
                slot.copy_(self.rotation.rotate_by(torch.stack([cos, -sin]), slot))

    def order_slots(self) -> None:
        """Put the kept tokens into the first slots, in order, as before anything is evicted."""
        if self.is_initialized:
            for slots in (self.keys, self.values):
                kept = self._joined(slots, slots[:, :, :0], self.shift)
                slots[:, :, : kept.shape[2]] = kept

    def forget(self, shift: int) -> None:
        """Count no more the first `shift` tokens that were evicted."""
        self._cropped = 0
        self.seen = max(self.seen - shift, 0)

    def turning(self, key_states: Tensor, value_states: Tensor) -> Tensor:
        """Those of the two that carry the position."""
        return value_states if self.rotation is not None and self.rotation.in_values else key_states

    def _take(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store the states of new tokens, and count these."""
        self._write(key_states, value_states)
        self.seen += key_states.shape[2]

    def _write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Put the states of new tokens into their slots, over those of the tokens they evict."""
        key_states, value_states = key_states.detach(), value_states.detach()
        if self.rows.pads is not None:
            self._write_rows(key_states, value_states)
            return
        query_length = key_states.shape[2]
        num_sinks = min(max(self.num_sink_tokens - self.seen, 0), query_length)
        if num_sinks > 0:
            born = slice(self.seen, self.seen + num_sinks)
            self.keys[:, :, born] = key_states[:, :, :num_sinks]
            self.values[:, :, born] = value_states[:, :, :num_sinks]
            if self.rotation is not None:
                self.sinks[:, :, born] = self.turning(key_states, value_states)[:, :, :num_sinks]
                self.group.forget_sinks()
        # Of a chunk longer than the ring only the last tokens stay.
        skipped = max(num_sinks, query_length - (self.window_length - self.num_sink_tokens))
        first = self.rows.slot(self.seen + skipped)
        straight = min(query_length - skipped, self.window_length - first)
        for slots, states in ((self.keys, key_states), (self.values, value_states)):
            slots.narrow(2, first, straight).copy_(states.narrow(2, skipped, straight))
            if skipped + straight < query_length:
                wrapped = states[:, :, skipped + straight :]
                slots[:, :, self.num_sink_tokens : self.num_sink_tokens + wrapped.shape[2]] = wrapped

    def _write_rows(self, key_states: Tensor, value_states: Tensor) -> None:
        """The same for rows with different padding, which lie in different slots."""
        query_length, device = key_states.shape[2], key_states.device
        is_new, source = self.rows.sources(self.seen, query_length, self.window_length, device)
        for slots, states in ((self.keys, key_states), (self.values, value_states)):
            slots.copy_(torch.where(is_new[:, None, :, None], take(states, source), slots))
        if self.rotation is not None:
            is_new, source = self.rows.sources(self.seen, query_length, self.num_sink_tokens, device)
            born = take(self.turning(key_states, value_states), source)
            self.sinks.copy_(torch.where(is_new[:, None, :, None], born, self.sinks))
            self.group.forget_sinks()

    def activate_past_recording(self) -> None:
        """From now on keep what each update evicts until the next call, so that `crop` can take the update back."""
        self.record_past = True

    def deactivate_past_recording(self) -> None:
        """Store what was recorded, and from now on every update at once."""
        self._store_recorded()
        self.record_past = False

    def _store_recorded(self) -> None:
        if self._recorded is not None:
            key_states, value_states = self._recorded
            self._recorded = None
            if key_states.shape[2] == 0:  # all taken back
                return
            self._take(key_states, value_states)

    def length_after_crop(self, tokens_to_remove: int) -> int:
        """How many tokens will have been seen after `crop(tokens_to_remove)`.

        Raises:
            ValueError: if those to take back are not all held.
        """
        now = self.get_seq_length()
        seen = tokens_to_remove if tokens_to_remove > 0 else now + tokens_to_remove
        # Sinks can be taken back only before anything was evicted between them and the end, and in a padded batch,
        # whose rows evict at different times, nothing.
        least = self.shift + self.num_sink_tokens if self.shift > 0 else 0
        if self.shift > 0 and self.rows.pads is not None:
            least = self.seen
        if seen < least:
            raise ValueError(
                f"`tokens_to_remove` must be at least {least - now}, got {tokens_to_remove}: of the {now} tokens seen "
                f"the last {now - least} can be taken back."
            )
        return min(seen, now)

    def crop(self, tokens_to_remove: int) -> None:
        seen = self.length_after_crop(tokens_to_remove)
        if self._recorded is not None:
            accepted = max(seen - self.seen, 0)
            self._recorded = self._recorded[0][:, :, :accepted], self._recorded[1][:, :, :accepted]
            self._store_recorded()
        self._cropped = self.shift
        self.seen = seen

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return

        def replaced(states: Tensor) -> Tensor:
            new = function(states)
            # Compiled steps know where the states of a batch of this size are.
            return states.copy_(new) if self.rows.accelerated and new.shape == states.shape else new

        with torch.inference_mode(False):
            self._store_recorded()
            self.keys, self.values = replaced(self.keys), replaced(self.values)
            if self.rotation is not None:
                self.sinks = replaced(self.sinks)
                self.group.forget_sinks()
            self._hold()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_batch(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_batch(lambda states: states[indices])


class HybridSinkLayer(SinkLayer, LinearAttentionAndFullAttentionLayer):
    """A `SinkLayer` beside the states of a linear attention or a convolution, whose size is constant by itself."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # With keys and values by position for the ring, with states by name for the other.
        (SinkLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        SinkLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        SinkLayer.crop(self, tokens_to_remove)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """True while updates are recorded, unless there is a recurrent state, which has no way back."""
        return self.record_past and not any(self.is_recurrent_states_initialized.values())

    def deactivate_past_recording(self) -> None:
        if self.record_past and self.is_initialized:
            LinearAttentionLayer.crop(self, 0)  # cuts what it recorded
        super().deactivate_past_recording()

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        super()._map_batch(function)
        _map_linear(self, function)


class IndexedSinkLayer(SinkLayer):
    """A `SinkLayer` with a second ring, of the keys by which an indexer selects tokens (DeepSeek sparse attention).

    Args:
        indexer_rotation: how the indexer's keys turn; None if they carry no position.
    """

    def __init__(
        self, rows: "Rows", rotation: Rotation | None, in_order: bool, indexer_rotation: Rotation | None
    ) -> None:
        self.indexer = SinkLayer(rows, indexer_rotation, in_order)
        self._position_shape: torch.Size | None = None
        super().__init__(rows, rotation, in_order)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Store the indexer's keys `[batch_size, query_length, index_head_dim]`; returns those of all kept tokens."""
        states = indexer_key_states[:, None]
        return self.indexer.update(states, states[..., :0])[0][:, 0]

    @property
    def indexer_position_ids(self) -> Tensor | None:
        """Positions of the kept tokens before the coming update, `[position_dims, batch_size, kept]`: contiguous."""
        seen = self.get_seq_length()
        if self._position_shape is None or seen == 0:
            return None
        positions = torch.arange(self.shift_of(seen + 1), seen, device=self.device)
        position_dims, batch_size = self._position_shape
        return positions.expand(position_dims, batch_size if batch_size == 1 else self.keys.shape[0], -1)

    @indexer_position_ids.setter
    def indexer_position_ids(self, position_ids: Tensor) -> None:
        # The positions are known; how the model shapes them is not.
        self._position_shape = position_ids.shape[:-1]

    def reset(self) -> None:
        self.indexer.reset()
        super().reset()

    def activate_past_recording(self) -> None:
        self.indexer.activate_past_recording()
        super().activate_past_recording()

    def deactivate_past_recording(self) -> None:
        self.indexer.deactivate_past_recording()
        super().deactivate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        if self.indexer.is_initialized:  # some layers share the indexer of another
            self.indexer.crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        self.indexer._map_batch(function)
        super()._map_batch(function)


def _map_linear(layer: Any, function: Callable[[Tensor], Tensor]) -> None:
    for states in (layer.conv_states, layer.recurrent_states):
        for i, state in states.items():
            if state is not None:
                states[i] = function(state)


def _state_of(layer: Any) -> dict[str, Any]:
    """All that a layer of a cache holds, of whatever kind it is."""

    def copied(value: Any) -> Any:
        if isinstance(value, SinkLayer):
            return _state_of(value)
        if isinstance(value, Tensor):
            return value.detach().to("cpu", copy=True)
        if isinstance(value, list | tuple):
            return [copied(each) for each in value]
        return {key: copied(each) for key, each in value.items()} if isinstance(value, dict) else value

    state = {name: copied(value) for name, value in vars(layer).items() if name not in _DERIVED}
    return {"kind": type(layer).__name__, **state}


def _restore(layer: Any, state: dict[str, Any], device: str | torch.device | None) -> None:
    """Give a new layer what `_state_of` found in another one; a `device` takes the place of those it was on."""

    def here(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device(value if device is None else device)
        if isinstance(value, Tensor):
            there = state.get("device") if device is None else device
            return value.to("cpu" if there is None else there)
        if isinstance(value, list | tuple):
            return type(value)(here(each) for each in value)
        return {key: here(each) for key, each in value.items()} if isinstance(value, dict) else value

    for name, value in state.items():
        if isinstance(getattr(layer, name, None), SinkLayer):
            _restore(getattr(layer, name), value, device)
        elif name != "kind":
            try:
                setattr(layer, name, here(value))
            except (RuntimeError, AssertionError) as error:  # by which torch says that there is no such device
                raise ValueError(
                    f"`device` must be at hand, got {device!r} for states that were on {state['device']}: {error}"
                ) from error


def _turn_alike(rotation: Rotation | None, other: Rotation | None) -> bool:
    """Whether two rotations are the same, but for what frequencies differ by from one machine to another."""
    if rotation is None or other is None or repr(rotation) != repr(other):
        return rotation is other
    return torch.allclose(rotation.inv_freq.cpu(), other.inv_freq, rtol=1e-5, atol=0)


def _can_take_back(layer: Any, removed: int) -> bool:
    """Whether a layer that is no ring, or no ring alone, still holds what it needs with so many tokens less."""
    recording: bool = getattr(layer, "record_past", False)
    if isinstance(layer, LinearAttentionLayer):
        kernels: dict[int, Any] = layer.conv_kernel_size
        states = layer.conv_states.items()
        kept = all(state is None or state.shape[-1] - removed >= kernels[i] for i, state in states)
        if not (recording and kept) or any(layer.is_recurrent_states_initialized.values()):
            return False
    if isinstance(layer, DynamicSlidingWindowLayer) and (seen := layer.get_seq_length()) >= layer.sliding_window:
        held: int = layer.keys.shape[2]  # type: ignore[union-attr]
        return recording and held - removed >= min(seen - removed, layer.sliding_window - 1)
    return True


def _becomes_ring(layer: Any, layer_idx: int, config: PreTrainedConfig, window_length: int) -> bool:
    """Whether a layer of `DynamicCache(config=config)` attends further back than `window_length` tokens."""
    if type(layer) in (DynamicLayer, DynamicIndexedLayer, LinearAttentionAndFullAttentionLayer):
        return True
    if type(layer) in (DynamicSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer):
        layer_types = getattr(config, "layer_types", None)
        # Chunked layers share the class; their chunks start at absolute positions.
        chunked = layer_types is not None and layer_types[layer_idx] == "chunked_attention"
        chunked |= layer_types is None and getattr(config, "sliding_window", None) is None
        wider: bool = layer.sliding_window > window_length
        return wider and not chunked
    if isinstance(layer, DynamicLayer):
        raise NotImplementedError(
            f"SinkCache does not support the model type {config.model_type!r}: layer {layer_idx} keeps its tokens in a "
            f"{type(layer).__name__}, a form of its own, from which single tokens cannot be evicted."
        )
    return False


def _empty_slots(states: Tensor, window_length: int) -> Tensor:
    batch_size, num_heads, _, head_dim = states.shape
    return states.new_zeros(batch_size, num_heads, window_length, head_dim)


def _count_pads(attention_mask: Tensor | None) -> Tensor | None:
    """How many pads each row of a mask `[batch_size, length]` begins with; None if it has none."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or attention_mask.is_complex():
        shape = [*attention_mask.shape] if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"`attention_mask` must be a tensor of shape [batch_size, prompt_length], got {shape}.")
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("`attention_mask` must be 1 for tokens and 0 for padding, got other values.")
    mask = attention_mask.long()
    if not bool((mask[:, 1:] >= mask[:, :-1]).all()) or not bool((mask[:, -1:] == 1).all()):
        raise ValueError(
            "`attention_mask` must be padded on the left: zeros, then ones, in every row. Set the tokenizer's "
            "`padding_side` to 'left'. If the pad token is a word of the prompt, pass a mask of ones."
        )
    pads = mask.shape[1] - mask.sum(dim=1)
    return pads if bool(pads.any()) else None


def _starts_with_pads(key_states: Tensor, value_states: Tensor) -> bool:
    """Whether in some row of `[batch_size, num_heads, length, head_dim]` the first two tokens are equal."""
    if min(key_states.shape[2], value_states.shape[2]) < 2:
        return False
    equal_keys, equal_values = ((x[:, :, 0] == x[:, :, 1]).flatten(1).all(dim=1) for x in (key_states, value_states))
    return bool((equal_keys & equal_values).any())


def _check_int(name: str, value: object, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an int, got {value!r}.")
    if value < at_least:
        raise ValueError(f"`{name}` must be at least {at_least}, got {value}.")

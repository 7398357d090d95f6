"""`SinkCache`: a KV cache that holds the first tokens of a stream (the attention sinks) and the most recent ones.

What this library adds to a cache; what `transformers` calls on one is in `stream_cache`. Storage and eviction are in
`storage`, what a model is like in `architecture`; this module knows no model.
"""

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from . import files
from .architecture.settings import check_config, has_grid_positions
from .architecture.spec import cache_spec, check_arguments
from .compat import PassWatch
from .rope import Rotation
from .storage import changes, checkpoint
from .storage.columns import token_indices
from .storage.coordinates import Coordinates
from .storage.groups import Plan
from .storage.positions import TokenPositions, left_padding_of, token_positions
from .storage.stream import Stream
from .stream_cache import StreamCache

DEFAULT_WINDOW_LENGTH = 256
DEFAULT_NUM_SINK_TOKENS = 4


class SinkCache(StreamCache):
    """A KV cache that holds at most `window_length` tokens per layer, for streams without end.

    Positions count upwards indefinitely, as `generate` counts them; attention sees the kept tokens as if they were
    contiguous (StreamingLLM, arXiv 2309.17453). A recent key keeps the rotation it was fed with; an eviction overwrites
    one slot; only the sinks are rotated, from pristine copies.

    Args:
        config: the config of the model, `model.config`; the rotation of the cached keys is derived from it.
        window_length: the most tokens a layer holds, sinks included.
        num_sink_tokens: the number of first tokens that are never evicted; `0` is plain window attention.
        rotation: the rotation of the cached keys, for models that cannot be measured, such as those with code of their
            own (`trust_remote_code`). It is not checked.
        attention_mask: the mask of the first prompt, `[batch_size, prompt_length]`, if rows are padded on the left, or
            of ones to say that they are not.

    Layers with a sliding window of at most `window_length`, and layers without attention, are those of `DynamicCache`.

    Raises:
        TypeError, ValueError: naming the argument and its value.
        NotImplementedError: naming the model type and the reason, for a model that cannot be supported exactly.

    Warns:
        UserWarning: if the model gives images positions on a grid (M-RoPE), of which plain `generate` says nothing.

    Example:
        >>> cache = SinkCache(model.config, window_length=256, num_sink_tokens=4)
        >>> output_ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=1000)  # or cache=cache
        >>> cache.get_seq_length(), cache.kept_length
        (1008, 256)
    """

    # `config` is required. It has a default so that the calls of older `SinkCache`s meet our error, not Python's.
    def __init__(
        self,
        config: PreTrainedConfig = None,  # type: ignore[assignment]
        window_length: int = DEFAULT_WINDOW_LENGTH,
        num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS,
        rotation: Rotation | None = None,
        attention_mask: Tensor | None = None,
    ) -> None:
        check_arguments(config, window_length, num_sink_tokens, rotation)
        self._spec = cache_spec(config, window_length, num_sink_tokens, rotation)
        if has_grid_positions(config):
            warnings.warn(
                f"Plain `generate` tells a cache nothing of the positions that a {config.model_type!r} model gives to "
                "images and videos: with these, call `sink_generate`, or use a `SinkSession`. Text alone is "
                "exact either way. A cache of `model.config.get_text_config()` is the same without this warning.",
                stacklevel=2,
            )
        super().__init__(Stream(self._spec, self._positions_of(attention_mask)))

    def _positions_of(self, attention_mask: Tensor | None) -> TokenPositions:
        padding = left_padding_of(attention_mask)
        if padding is not None and not self._spec.accepts_padding:
            raise NotImplementedError(
                f"`attention_mask` must not have padding: this {self._spec.model_type!r} model builds its attention "
                "from the number of all tokens seen. Generate for prompts of equal length together, or one by one."
            )
        return token_positions(padding, told=(0, 0) if attention_mask is None else attention_mask.shape)

    # --- what the cache holds

    @property
    def window_length(self) -> int:
        """The most tokens a layer holds, sinks included."""
        return self._spec.window_length

    @property
    def num_sink_tokens(self) -> int:
        """Number of first tokens that are never evicted."""
        return self._spec.num_sink_tokens

    @property
    def config(self) -> PreTrainedConfig:
        """The config of the text model that the cache was made for."""
        return self._spec.config

    @property
    def kept_length(self) -> int:
        """Number of tokens held now: `min(seen, window_length)`, or fewer after a `crop`."""
        return self._stream.first.kept_length

    @property
    def num_rows(self) -> int:
        """Number of rows of a batch that are stored, 0 before the first prompt."""
        keys = self._stream.first.keys
        return 0 if keys is None else keys.shape[0]

    def token_indices(
        self, layer_idx: int = 0, attentions: Tensor | None = None, *, seen: int | None = None, prefilled: bool = False
    ) -> Tensor:
        """Return which token stands in which column, `[num_rows, columns]`; -1 where there is none.

        Past the window neither the keys that a layer holds nor attention weights are in the order of the text. An index
        counts all that was fed, pads included, as `get_seq_length` does: token `i` of a row is `input_ids[row, i]`.

        Args:
            layer_idx: the layer.
            attentions: attention weights of the layer in a pass, `[..., query_length, columns]`: the columns of these.
                Without them, the columns are those of `layers[layer_idx].keys`.
            seen: number of tokens seen after that pass, if it was not the last one.
            prefilled: True if it was a pass of `sink_prefill`.

        Raises:
            ValueError: if the layer holds no keys of the text, or the weights have another number of columns.

        Example:
            >>> output = model(input_ids, past_key_values=cache, output_attentions=True)
            >>> indices = cache.token_indices(0, output.attentions[0])
            >>> text.gather(1, indices.clamp(min=0))  # the token ids of the columns
        """
        return token_indices(self._stream, layer_idx, attentions, seen, prefilled)

    # --- positions and left padding

    @property
    def position_limit(self) -> int:
        """Number of positions before the model ends or changes its behaviour."""
        return self._spec.positions.limit

    @property
    def can_rebase(self) -> bool:
        """True if positions can be rebased: the model reads them from `position_ids`, and all attention keeps sinks."""
        return self._spec.can_rebase

    @property
    def token_positions(self) -> TokenPositions:
        """At which positions the tokens of each row stand; makes `position_ids` and padding masks."""
        return self._stream.layout.positions

    def text_positions(self, like: Tensor) -> Tensor:
        """Return the positions of text that follows, as the model needs them, shaped `[rows, n]` like `like`."""
        seen, coordinates, positions = self.get_seq_length(), self.coordinates, self.token_positions
        if coordinates is not None:
            return coordinates.before(seen).text(self._stream.layout, like.shape[1]).to(like.device)
        rows = like[: positions.num_rows or None]  # beams repeat the rows of a prompt that the cache knows
        text = positions.position_ids(positions.true_positions(seen, rows))
        return text.repeat_interleave(len(like) // len(rows), dim=0)

    @property
    def position_offsets(self) -> int | Tensor:
        """How much lower positions are than `generate` counts them, for all rows or for each one, `[batch_size]`."""
        return self.token_positions.offsets()

    def positions_left(self, seen: int | None = None) -> int:
        """Return how many tokens can follow the `seen` ones before the model ends or changes its behaviour.

        Without `seen` this is a lower bound that needs no device synchronisation.
        """
        return self._stream.positions_left(seen)

    def rebase(self) -> None:
        """Lower the positions of all kept tokens by the number of evicted ones.

        From then on the model must be given `position_ids` that are `position_offsets` lower. Attention sees no
        difference. In your own decoding loop, call `compact()` instead.

        Raises:
            NotImplementedError: if the model counts positions by itself or has layers that cannot be rebased.
        """
        self._check_rebasable()
        with self._stream.changing():
            changes.rebase(self._stream)

    def compact(self) -> None:
        """Restart positions at the kept tokens, as if evicted ones had never been fed.

        `get_seq_length()` becomes `kept_length`, and nothing that counts a stream without end has to grow. Attention
        sees no difference. The states are rounded once, as by `rebase`.

        Raises:
            NotImplementedError: if positions cannot be rebased, see `rebase`.
        """
        self._check_rebasable()
        with self._stream.changing():
            changes.compact(self._stream)

    def _check_rebasable(self) -> None:
        if not self.can_rebase:
            raise NotImplementedError(
                "The positions of this model cannot be rebased: it does not read them from `position_ids` alone, or "
                "has attention layers without sinks. Start a new stream with `reset()`."
            )

    def make_room(self, query_length: int) -> None:
        """Rebase if `query_length` new tokens would reach the end of the positions, or where they are less accurate.

        No key is rounded by that more than once in its life, since two windows lie in between, unless positions end
        before that.
        """
        if changes.needs_rebase(self._stream, query_length):
            self.rebase()

    def announce_padding(self, attention_mask: Tensor) -> None:
        """Tell an empty cache of the padding of the first prompt, `[batch_size, prompt_length]`.

        Raises:
            ValueError: if the mask is not padded on the left, or if the cache is not empty.
        """
        if self.get_seq_length() > 0:
            raise ValueError("`attention_mask` must be announced before the first prompt. Call `reset()` first.")
        positions = self._positions_of(attention_mask)
        self.reset()
        self._stream.set_positions(positions)

    def holds_padding(self) -> bool:
        """Return True if some layer may still hold pads, or slots without a token, which a mask must hide."""
        return self.get_seq_length() - self._spec.longest_window < self.token_positions.max_padding

    # --- passes whose positions and masks the caller takes from the cache: `sink_generate` and `sink_prefill`

    @property
    def watch(self) -> PassWatch:
        """Checks that forward passes go the way that this library relies on."""
        return self._stream.watch

    @property
    def needs_temporal_order(self) -> bool:
        """True if attention counts distances by the order of the cached tokens (ALiBi)."""
        return self._spec.positions.needs_temporal_order

    @property
    def supports_windowed_chunks(self) -> bool:
        """True if a chunk can be read with a window for each of its tokens: all layers are plain sink layers."""
        return self._spec.supports_windowed_chunks

    @property
    def coordinates(self) -> Coordinates | None:
        """The coordinates of the last tokens, or None if all tokens of the stream are counted as text."""
        return self._stream.coordinates

    def announce(self, query_length: int, windowed: bool = False, positions: Tensor | None = None) -> Plan:
        """Return the plan of the coming pass of `query_length` tokens. Call `drop_plan` after the pass.

        The caller gives the model positions as `token_positions` counts them, or, if they are not those of text,
        `positions`, `[num_axes, batch_size, query_length + 1]`, of which the last is that of text that would follow. If
        `windowed`, each query of the chunk sees its own window, by a mask that the caller makes from the plan.
        """
        return self._stream.announce(query_length, windowed, positions)

    def drop_plan(self) -> None:
        """Forget a pass that was announced, if it did not take place."""
        self._stream.drop_plan()

    @contextlib.contextmanager
    def announced(self, query_length: int, windowed: bool = False, positions: Tensor | None = None) -> Iterator[Plan]:
        """Announce the pass inside, see `announce`."""
        try:
            yield self.announce(query_length, windowed, positions)
        finally:
            self.drop_plan()

    def expect_compiled_steps(self) -> None:
        """Expect single tokens to be compiled again, where `generate` compiles by itself."""
        self._stream.policy.expect_compiled_steps()

    # --- copies of a stream, in memory and in files

    def fork(self) -> Self:
        """Return a copy of the stream, which goes on by itself and bitwise as this one would.

        So a prompt is read once for many conversations, or a document for many continuations. The copy takes the memory
        of the window; nothing of the model is copied.

        Raises:
            RuntimeError: if a forward pass was interrupted half-way, or runs now.

        Example:
            >>> answers = [sink_generate(model, prompt, cache=cache.fork(), do_sample=True) for _ in range(3)]
        """
        with checkpoint.between_passes(self._stream), torch.inference_mode(False):
            fork = copy.deepcopy(self, checkpoint.clones_of_views(self._stream))
        fork.drop_plan()  # the fork is no part of a pass that was announced
        return fork

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the stream to a safetensors file, from which `load` resumes it: what follows is bitwise the same.

        An old file of that name is replaced at once and by a whole one only, even if the process is killed meanwhile.

        Args:
            path: where to write the file, which is about as large as the cache. With tensor parallelism, one for each
                process.

        Raises:
            RuntimeError: if a forward pass was interrupted half-way, so that there is nothing to resume, or runs now.
            OSError: if the file cannot be written.
        """
        files.write(path, "cache", self.state())

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: PreTrainedConfig, device: str | torch.device | None = None
    ) -> Self:
        """Return the cache that `save` wrote, to go on where it was.

        Args:
            path: the file.
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
        """Return the stream as plain values and tensors; what layers hold is copied to the CPU."""
        return checkpoint.stream_state(self._stream)

    @classmethod
    def from_state(
        cls, state: dict[str, Any], config: PreTrainedConfig, device: str | torch.device | None = None
    ) -> Self:
        """Return a cache in the state that another one was in; see `load`."""
        state = checkpoint.checked_state(state)
        if isinstance(config, PreTrainedConfig):  # anything else is refused below
            config = config.get_text_config(decoder=True)
            check_config(state["config"], config, "`config` must be that of the model whose stream was saved")
        rotations = checkpoint.rotations_from(state["rotations"])
        by_hand = None if state["measured"] else next((each for each in rotations if each is not None), None)
        cache = cls(config, state["window_length"], state["num_sink_tokens"], by_hand)
        checkpoint.restore_stream(cache._stream, state, device)
        return cache

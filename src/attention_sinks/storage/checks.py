"""What is refused before anything is stored: states of another form, chunks that hide the sinks, ends of positions."""

import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..rope import Rotation
from .coordinates import Coordinates
from .plan import UpdatePlan
from .positions import TokenPositions

# Models compute angles in float32, with an error that grows with the position (docs/reliability.md): up to here the
# logits of SmolLM2-135M change by 2e-4 of their scale, ...
ACCURATE_POSITIONS = 2**15
# ... and from here on by 1 %.
COARSE_POSITION = 2**20
# What rounding may change between rows of a batch, relative to the largest value.
ROUNDING = 2**-6
# How a batch goes on after a common text.
ROW_BY_ROW = (
    "Pads after the first prompt cannot be hidden: continue each row by itself, without pads, with a copy of the cache "
    "(`cache.fork()`; `batch_select_indices` chooses a row)"
)


def check_agreement(key_states: Tensor, value_states: Tensor) -> None:
    """Check that new keys and values belong to the same tokens."""
    new_keys, new_values = key_states.shape, value_states.shape
    if (new_keys[0], new_keys[2]) != (new_values[0], new_values[2]):
        raise ValueError(
            "`key_states` and `value_states` must agree in batch size and number of tokens, got the shapes "
            f"{[*new_keys]} and {[*new_values]}."
        )


def check_states(keys: Tensor, values: Tensor, key_states: Tensor, value_states: Tensor) -> None:
    """Check that new states are like those that are stored."""
    # Fast path: all checks below in one condition, cheap enough for each layer of each step.
    stored_keys, stored_values, new_keys, new_values = keys.shape, values.shape, key_states.shape, value_states.shape
    if (
        new_keys[0] == stored_keys[0] == new_values[0]
        and new_keys[1] == stored_keys[1]
        and new_values[1] == stored_values[1]
        and new_keys[2] == new_values[2]
        and new_keys[3] == stored_keys[3]
        and new_values[3] == stored_values[3]
        and key_states.dtype is keys.dtype
        and value_states.dtype is values.dtype
        and key_states.device == keys.device == value_states.device
    ):
        return
    check_agreement(key_states, value_states)
    for name, states, slots in (("key_states", key_states, keys), ("value_states", value_states, values)):
        if _heads(states) != _heads(slots):
            raise ValueError(
                f"`{name}` must keep batch size, heads and head dimension, {[*_heads(slots)]}, got the shape "
                f"{[*states.shape]}. Call `reset()`, or use a new cache, for another batch."
            )
        if states.dtype != slots.dtype or states.device != slots.device:
            raise ValueError(
                f"`{name}` must keep dtype and device, {slots.dtype} on {slots.device}, got {states.dtype} on "
                f"{states.device}. Move the cache with `to({str(states.device)!r}, {states.dtype})`, or call `reset()`."
            )


def check_head_dim(rotation: Rotation | None, states: Tensor) -> None:
    """Check that the first states of a layer have the dimensions that its rotation is made for."""
    if rotation is None:
        return
    head_dim, least = states.shape[-1], rotation.start + rotation.rotary_dim
    if head_dim < least or rotation.head_dim not in (None, head_dim):
        name = "value_states" if rotation.in_values else "key_states"
        raise ValueError(
            f"`{name}` must have head dimension {rotation.head_dim or f'at least {least}'}, as the `config` of the "
            f"cache says, got {head_dim}. Make the cache with the config of this model, `SinkCache(model.config)`."
        )


def _heads(states: Tensor) -> tuple[int, int, int]:
    """Return batch size, number of heads and head dimension."""
    batch_size, num_heads, _, head_dim = states.shape
    return batch_size, num_heads, head_dim


def check_batch(stored: int, dtype: torch.dtype, key_states: Tensor) -> None:
    """Check that new keys belong to the batch of `stored` rows that other layers hold, and are of its dtype."""
    if key_states.shape[0] != stored or key_states.dtype != dtype:
        raise ValueError(
            f"`key_states` must keep batch size and dtype, {stored} and {dtype}, got the shape {[*key_states.shape]} "
            f"in {key_states.dtype}. Call `reset()`, or use a new cache, to change them."
        )


def check_no_pads(positions: TokenPositions, start: int, key_states: Tensor, value_states: Tensor) -> None:
    """Check that there are no pads among new tokens but those that are known.

    `generate` puts all pads at one position, so that the states of two in a row are equal. Those of other tokens are
    not, where states rotate, unless they are zero: such tokens count as pads at the start of a chunk, and at the end of
    the first one.
    """
    check_agreement(key_states, value_states)
    first = max(positions.known_length(len(key_states)) - start - 1, 0)
    keys, values = key_states[:, :, first:], value_states[:, :, first:]
    if keys.shape[2] < 2:
        return
    # Almost always the first head suffices.
    for heads in (slice(1), slice(None)):
        equal = torch.stack([(x[:, heads, 1:] == x[:, heads, :-1]).all(dim=3).all(dim=1) for x in (keys, values)])
        if not (equal := equal.all(dim=0)).any():
            return
    counts = (keys[:, :, 1:] != 0).any(dim=3).any(dim=1)
    counts[:, 0] |= first == 0
    counts[:, -1] |= start == 0
    tokens = (equal & counts).any(dim=0).nonzero()
    if len(tokens) > 0:
        token = start + first + int(tokens[0])
        _refuse_pads(token, is_first_prompt=start == 0)


def _refuse_pads(token: int, is_first_prompt: bool) -> NoReturn:
    where = f"are equal for the tokens {token} and {token + 1}" if token > 0 else "start with two equal tokens"
    remedy = "Tell the cache of it: `SinkCache(config, ..., attention_mask=attention_mask)`, or call `sink_generate`, "
    remedy += "which does."
    if not is_first_prompt:
        remedy = f"{ROW_BY_ROW}. If they are text, call `sink_generate` with an `attention_mask` of ones."
    elif token > 0:
        remedy = f"Set the tokenizer's `padding_side` to 'left'. {remedy} If they are text, give it a mask of ones."
    raise ValueError(f"`key_states` {where}, as only padding does. {remedy}")


def check_not_read_again(sinks: Tensor, start: int, states: Tensor) -> None:
    """Check that new tokens `[batch_size, num_heads, query_length, head_dim]` are not the first ones of the stream.

    At another position the states of a token differ. Equal ones were given the first positions again, which `generate`
    does to a whole text that is no longer than what was seen.
    """
    first, states = sinks[:, :, :2], states[:, :, :2]
    if start < 2 or first.shape[2] < 2 or states.shape[2] < 2:
        return
    # Chunks of other lengths are rounded in other ways.
    near = torch.isclose(states.to(first.dtype), first, rtol=2 * torch.finfo(states.dtype).eps, atol=1e-6)
    is_text = (first[:, :, 0] != first[:, :, 1]).flatten(1).any(dim=1)
    if bool((near.flatten(1).all(dim=1) & is_text).any()):
        raise ValueError(
            f"`input_ids` begin like the stream, at its first positions, after {start} tokens were seen: `generate` "
            "reads a text again that is no longer than what was seen. Give it the whole text, uncut, with a token that "
            "is new; or new tokens alone, with an `attention_mask` for all that were seen and the new ones."
        )


def num_repeats(num_rows: int, key_states: Tensor, is_compiling: bool) -> int:
    """Return how often each row of a mask with `num_rows` rows is repeated in a batch, for beams and several answers.

    Repeated rows begin with the same pads. (While the model is compiled that cannot be checked.)
    """
    repeats, rest = divmod(len(key_states), num_rows)
    if rest == 0 and not is_compiling:
        rows = key_states[:, 0].unflatten(0, (num_rows, repeats))
        first = rows[:, :1, :1]
        is_pad = ((rows - first).abs() <= ROUNDING * first.abs().amax(dim=3, keepdim=True)).all(dim=3)
        length = is_pad.long().cumprod(dim=2).sum(dim=2)
        rest = int((length != length[:, :1]).any())
    if rest != 0:
        raise ValueError(
            f"`attention_mask` must have a row for each of the {len(key_states)} sequences, or for each group of equal "
            f"padding, got {num_rows}."
        )
    return repeats


def refuse_empty(seen: int) -> NoReturn:
    """Refuse a forward pass without tokens, which `generate` begins if a text and its mask were cut alike."""
    raise ValueError(
        f"`input_ids` must bring new tokens, got none after {seen}. `generate` takes a text as long as its "
        "`attention_mask` for the whole text, and drops as many tokens as were seen: do not cut it. Or give new tokens "
        "alone, with an `attention_mask` for all that were seen and the new ones."
    )


def refuse_unstored(plan: UpdatePlan) -> NoReturn:
    """Say that a model left a pass undone: a single token follows, and no layer has stored those of the pass."""
    raise RuntimeError(
        f"The last forward pass stored none of its {plan.query_length} tokens, the cache has seen {plan.start}. Layers "
        "drop the cache if they checkpoint activations in training mode: call `model.eval()`, or "
        "`model.gradient_checkpointing_disable()`. If the pass was interrupted, call the model again."
    )


def check_replacement(name: str, slots: Tensor, new: Tensor, sinks_of: Callable[[Tensor], Tensor] | None) -> None:
    """Check what a caller puts in the place of the slots of a layer: a copy of them, elsewhere or in another dtype.

    Args:
        name: the attribute.
        slots, new: what the layer has, and what it gets.
        sinks_of: returns what lies in the slots of the sinks, if these are kept a second time.
    """
    if not isinstance(new, Tensor) or new.shape != slots.shape or not new.is_floating_point():
        got = f"{[*new.shape]} in {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
        raise ValueError(
            f"`{name}` of a layer must keep the shape {[*slots.shape]} and a floating dtype, got {got}. To change rows "
            "or tokens, call `batch_select_indices`, `reorder_cache`, `crop` or `reset` of the cache."
        )
    if sinks_of is None or slots.is_meta or new.is_meta:
        return
    sinks = sinks_of(slots)
    rounding = ROUNDING * float(sinks.abs().max())
    if not torch.allclose(sinks_of(new).to(sinks), sinks, rtol=0, atol=rounding, equal_nan=True):
        raise ValueError(
            f"`{name}` of a layer must keep the sinks, of which the cache has copies as they were fed: others would be "
            "lost. To change rows, call `batch_select_indices` or `reorder_cache` of the cache."
        )


def check_not_exported() -> None:
    """Check that the model that is traced is compiled, not exported."""
    if torch.compiler.is_exporting():
        raise NotImplementedError(
            "A SinkCache cannot be exported: its counts would be constants of the exported program. Compile the model "
            "with `torch.compile`, or export it with a cache of `transformers`."
        )


def layer_of_another_model(layers: Sequence[object], layer_idx: int) -> ValueError:
    """Return the error for the states of a layer that a cache does not have."""
    there = f"layer {layer_idx} is a {type(layers[layer_idx]).__name__}" if layer_idx < len(layers) else "there is none"
    return ValueError(
        f"`layer_idx` cannot be {layer_idx}: {there} among the {len(layers)} layers of the `config` that the cache was "
        "made with. Make the cache with the config of this model, `SinkCache(model.config)`."
    )


def check_window(plan: UpdatePlan, sliding_window: float) -> None:
    """Check that the sliding window of a model shows the sinks to the last query of a pass."""
    if sliding_window < plan.kv_length > plan.query_length:
        num_kept = plan.kv_length - plan.query_length
        raise ValueError(
            f"`query_length` must be at most {sliding_window - num_kept} with {num_kept} tokens in the cache, got "
            f"{plan.query_length}: the sliding window of the model ({sliding_window}) would hide the sinks. Feed the "
            "tokens in smaller chunks."
        )


def check_limit(left: int, limit: int, seen: int, query_length: int) -> None:
    """Check that `query_length` tokens can follow the `seen` ones, with `left` positions up to `limit`."""
    if query_length > left:
        raise ValueError(
            f"`query_length` must be at most {left} after {seen} tokens, got {query_length}: the model ends or changes "
            f"its behaviour at position {limit}. Call `sink_generate`, which rebases positions where the model allows "
            "it, or start a new stream with `reset()`."
        )


def warn_of_coarse_positions(position: int, can_rebase: bool) -> None:
    """Warn that float32 angles begin to show in the logits."""
    remedy = (
        "Call `sink_generate`, which rebases positions, or, in your own decoding loop, `compact()` at times."
        if can_rebase
        else "The positions of this model cannot be rebased; start a new stream with `reset()`."
    )
    warnings.warn(
        f"The stream is at position {position}: models compute angles in float32, and there their roundings begin to "
        f"show in the logits. {remedy}",
        stacklevel=2,
    )


def check_rebased(positions: TokenPositions, coordinates: Coordinates | None, rebased: bool) -> None:
    """Check that the caller gives the model positions as the cache counts them, if nobody else can."""
    if coordinates is not None and not rebased:
        raise ValueError(
            "The cache counts positions by the images that it has seen, which plain `generate` does not know of. "
            "Continue it with `sink_generate` or `sink_prefill`."
        )
    if positions.offset > 0 and not rebased:
        raise ValueError(
            f"The cache counts positions from {positions.offset} tokens on, since `sink_generate` rebased them. "
            "Continue it with `sink_generate` or `sink_prefill`."
        )

"""`MessageWriter`: a message as tokens, and as what a processor makes of its images, videos and sound.

All of it is made and checked before a model reads any of it.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from .grids import rope_index_of
from .template import ChatTemplate, encode, is_processor
from .transcript import Transcript

# By argument: what templates call it, and the attributes of a processor that read it.
_MEDIA = {
    "images": ("image", ("image_processor",)),
    "videos": ("video", ("video_processor",)),
    "audio": ("audio", ("audio_processor", "feature_extractor")),
}
# What processors return for each token.
_OF_TOKENS = ("attention_mask", "image_embeds_position_mask", "input_ids", "mm_token_type_ids", "token_type_ids")
# Something that every tokenizer gives the same tokens at the start of a text, whatever follows.
_START = "a"


@dataclass
class Message:
    """A message, or the beginning of one, that no model has read.

    Attributes:
        ids: its tokens.
        num_before: how many of them the template writes before what the user says.
        at_once: those that are read in one pass, since images stand among them.
        placeholders: the ids whose place images take.
        features: what the model is given in that pass, until `take_features`.
        of_tokens: the same, with one value for each token, `[1, len(ids)]`.
    """

    ids: list[int]
    num_before: int = 0
    at_once: range = range(0)
    placeholders: frozenset[int] = frozenset()
    features: dict[str, Any] = field(default_factory=dict)
    of_tokens: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rest(self) -> list[int]:
        """The tokens after those that are read at once, or all of them."""
        return self.ids[self.at_once.stop :]

    def take_features(self, num_tokens: int) -> dict[str, Any]:
        """Return what the model is given with the last `at_once` of `num_tokens` tokens. Nobody else keeps it."""
        taken, self.features = self.features, {}
        end = self.at_once.stop
        for name, values in self.of_tokens.items():
            taken[name] = pad(values[:, :end], (max(num_tokens - end, 0), 0))[:, -num_tokens:]
        return taken


class MessageWriter:
    """Writes the messages of a conversation for a model.

    Args:
        owner: a tokenizer, or a processor for messages with images, videos and sound.
        system: the system prompt.

    Attributes:
        tokenizer: the tokenizer.
        template: the chat template.
    """

    def __init__(self, owner: Any, system: str | None) -> None:
        self._owner = owner
        self.template = ChatTemplate(owner, system)
        self.tokenizer = owner.tokenizer if is_processor(owner) else owner

    @property
    def processor(self) -> Any:
        """The processor, or None for a tokenizer."""
        return None if self._owner is self.tokenizer else self._owner

    def beginning(
        self, model: Any, transcript: Transcript, text: str | None, media: Mapping[str, Sequence[Any]]
    ) -> Message:
        """Return the beginning of a message, or more of one that has begun, with its media first.

        Args:
            model: the model that will read it.
            transcript: what stands before.
            text: what the user says.
            media: see `checked_media`.

        Raises:
            TypeError, ValueError: naming the argument and its value.
        """
        is_first = not transcript.ids
        before, placeholders, bos = "", "", list[int]()
        if transcript.turn in ("user", "media"):
            placeholders = self.template.within_message(is_first, _types(media)) if media else ""
        elif self.template.exists or media:
            before = self.template.before_message(is_first)
            placeholders = self.template.before_message(is_first, _types(media)) if media else before
            placeholders = placeholders.removeprefix(before)
        elif is_first and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]:
            is_first, bos = False, [self.tokenizer.bos_token_id]
        self.check(model, "text", text, media)
        message = self._written(model, transcript, before + placeholders + (text or ""), media, is_first)
        message.ids[:0] = bos
        message.num_before = len(bos) + len(encode(self.tokenizer, before, is_first))
        return message

    def whole(self, model: Any, transcript: Transcript, text: str, media: Mapping[str, Sequence[Any]]) -> Message:
        """Return a message, or the rest of one that has begun, up to the beginning of the answer; see `beginning`."""
        self.check(model, "message", text, media)
        is_first, types = not transcript.ids, _types(media)
        if transcript.turn not in ("user", "media"):
            written = self.template.turn(text, is_first, types)
        else:
            between = "\n\n" if transcript.turn == "user" else ""
            before = self.template.within_message(is_first, types) if media else between
            written = before + text + self.template.after_message(is_first)
        return self._written(model, transcript, written, media, is_first)

    def placeholders(self, model: Any) -> frozenset[int]:
        """Return the ids of tokens whose place images, videos or sound take."""
        found = set()
        for owner in (model.config, self.processor):
            for kind, _ in _MEDIA.values():
                ids = (getattr(owner, f"{kind}_{name}", None) for name in ("token_id", "token_index"))
                found |= {each for each in ids if isinstance(each, int)}
            if found:
                break
        return frozenset(found)

    def check(self, model: Any, name: str, text: str | None, media: Mapping[str, Sequence[Any]]) -> None:
        """Check that media can be processed, and that the text, the argument `name`, holds no place of any.

        Raises:
            ValueError: naming the argument.
        """
        for each in media:
            if self.processor is None:
                raise ValueError(
                    f"`{each}` must be left out: this session has a tokenizer, which reads text alone. Make it with "
                    "the processor of the model, `SinkSession(model, processor)`."
                )
            if not any(getattr(self.processor, attribute, None) is not None for attribute in _MEDIA[each][1]):
                raise ValueError(f"`{each}` must be left out: {type(self.processor).__name__} takes none.")
        placeholders = self.placeholders(model)
        if text is None or not placeholders:
            return
        found = next((each for each in encode(self.tokenizer, text, False) if each in placeholders), None)
        if found is not None:
            raise ValueError(
                f"`{name}` must not hold {self.tokenizer.decode([found])!r}, whose place an image, a video or sound "
                "takes. Give these by `images=`, `videos=` or `audio=`; the template puts them in their place."
            )

    def _written(
        self, model: Any, transcript: Transcript, text: str, media: Mapping[str, Sequence[Any]], is_first: bool
    ) -> Message:
        """Return the message that a text of the template makes."""
        if not media:
            return Message(encode(self.tokenizer, text, is_first))
        ids, of_tokens, features = self._processed(model, text, is_first, media)
        known = {*inspect.signature(model.forward).parameters}
        known |= {*inspect.signature(model.prepare_inputs_for_generation).parameters}
        unknown = next((each for each in features if each not in known), None)
        names, model_type = _names(media), model.config.model_type
        if unknown is not None:
            raise ValueError(f"{names} must be left out: this {model_type!r} model takes no `{unknown}`.")
        placeholders = self.placeholders(model)
        at = [i for i, token in enumerate(ids) if token in placeholders]
        if not at or "cross_attention_mask" in features:
            raise NotImplementedError(
                f"{names} are not supported by a session for this {model_type!r} model: they do not take the place of "
                "tokens. Give them to `sink_generate`."
            )
        window_length = transcript.cache.window_length
        if len(at) > window_length:
            raise ValueError(
                f"{names} must fit the window: they take {len(at)} tokens, and window_length={window_length}. Give "
                "smaller ones or fewer, or make the session with a larger window."
            )
        # Models find an image also by the token before it.
        at_once = range(max(at[0] - 1, 0), at[-1] + 1)
        return Message(
            ids, 0, at_once, placeholders, features, {each: of_tokens[each] for each in of_tokens if each in known}
        )

    def _processed(
        self, model: Any, text: str, is_first: bool, media: Mapping[str, Sequence[Any]]
    ) -> tuple[list[int], dict[str, Tensor], dict[str, Any]]:
        """Return the tokens of a text with media, what there is for each of them, and what there is besides."""
        arguments: dict[str, Any] = {"add_special_tokens": False, "return_tensors": "pt"}
        if rope_index_of(model) is not None:
            arguments["return_mm_token_type_ids"] = True
        for name, given in media.items():
            arguments[name] = [*given] if name == "audio" else [[*given]]  # of one text
        if "videos" in media:
            arguments["do_sample_frames"] = False
        rate = getattr(getattr(self.processor, "feature_extractor", None), "sampling_rate", None)
        if "audio" in media and rate is not None:
            arguments["sampling_rate"] = rate
        start = [] if is_first else encode(self.tokenizer, _START, True)
        try:
            output = self.processor(text=[_START * bool(start) + text], **arguments)
            if output["input_ids"][0, : len(start)].tolist() != start:
                start, output = [], self.processor(text=[text], **arguments)
        except Exception as error:
            name = type(self.processor).__name__
            raise ValueError(f"{_names(media)} must be what {name} can process: {error}") from error
        device = torch.device("cpu") if model.device.type == "meta" else model.device
        output = {name: _moved(value, device, model.dtype) for name, value in output.items()}
        of_tokens = {name: output.pop(name)[:, len(start) :] for name in _OF_TOKENS if name in output}
        of_tokens.pop("attention_mask", None)
        return of_tokens.pop("input_ids")[0].tolist(), of_tokens, output


def checked_media(**media: Any) -> dict[str, list[Any]]:
    """Return the images, videos and sound of a message, those that there are, after a look at their shapes.

    Raises:
        TypeError, ValueError: naming the argument and its value.
    """
    checked: dict[str, list[Any]] = {}
    for name, given in media.items():
        if given is None:
            continue
        if not isinstance(given, list | tuple):
            raise TypeError(f"`{name}` must be a list, got {_described(given)}: put one alone in brackets.")
        if given:
            checked[name] = [_CHECKS[name](name, each) for each in given]
    return checked


def _checked_image(name: str, image: Any) -> Any:
    if isinstance(image, str) or (hasattr(image, "convert") and hasattr(image, "size")):  # of a file, or of PIL
        return image
    shape = _shape(image)
    if shape is None:
        raise TypeError(f"`{name}` must hold images of PIL, arrays or tensors, got {_described(image)}.")
    if len(shape) != 3 or 0 in shape or not {shape[0], shape[2]} & {1, 3}:
        raise ValueError(
            f"`{name}` must hold images of the shape [height, width, 3] or [3, height, width], got {[*shape]}."
        )
    return image


def _checked_video(name: str, video: Any) -> Any:
    if isinstance(video, str):
        return video
    if isinstance(video, list | tuple):
        frames = [np.asarray(each.convert("RGB") if hasattr(each, "convert") else each) for each in video]
        shapes = {each.shape for each in frames}
        if len(shapes) != 1:
            raise ValueError(f"`{name}` must hold frames of one shape, got {sorted(shapes)!s:.80}.")
        video = np.stack(frames)
    shape = _shape(video)
    if shape is None:
        raise TypeError(f"`{name}` must hold lists of frames, arrays or tensors, got {_described(video)}.")
    if len(shape) != 4 or 0 in shape or not {shape[1], shape[3]} & {1, 3}:
        raise ValueError(
            f"`{name}` must hold videos of the shape [frames, height, width, 3] or [frames, 3, height, width], got "
            f"{[*shape]}."
        )
    return video


def _checked_sound(name: str, sound: Any) -> Any:
    if isinstance(sound, str):
        return sound
    shape = _shape(sound)
    if shape is None:
        raise TypeError(f"`{name}` must hold arrays or tensors, got {_described(sound)}.")
    if len(shape) != 1 or 0 in shape:
        raise ValueError(f"`{name}` must hold sound of one channel, of the shape [samples], got {[*shape]}.")
    return sound.numpy(force=True) if isinstance(sound, Tensor) else sound


_CHECKS = {"images": _checked_image, "videos": _checked_video, "audio": _checked_sound}


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor | np.ndarray) else None


def _described(value: Any) -> str:
    shape = _shape(value)
    return type(value).__name__ + ("" if shape is None else f" of the shape {[*shape]}")


def _names(media: Iterable[str]) -> str:
    return " and ".join(f"`{name}`" for name in media)


def _types(media: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return what templates call each of the media."""
    return [_MEDIA[name][0] for name, given in media.items() for _ in given]


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return what a model is given: pixels and sound have the type of its weights, times and numbers their own."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() and value.ndim > 1 else None)

"""`Passes`: the forward passes of a session, which read a transcript and generate what follows."""

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from .compat import DriftError
from .generate import ASSISTED, check_arguments, sink_generate
from .inputs import not_text
from .messages import Message
from .models import unwrapped
from .prefill import last_logits_only, sink_prefill
from .prompt import GenerationSettings
from .streaming import AnswerCriteria, Detokenizer, Emit, TokenStreamer, compile_permission
from .transcript import Transcript

# The arguments of `generate` that the session gives itself.
_OWN_ARGUMENTS = {
    "attention_mask", "cache", "cache_implementation", "custom_generate", "input_ids", "inputs", "inputs_embeds",
    "max_length", "min_length", "past_key_values", "position_ids", "prefill_chunk_size", "return_dict_in_generate",
    "streamer", "use_cache",
}  # fmt: skip

# How `generate` reads tokens and leaves it at that: the one that it chooses is dropped.
_READ_ALONE: dict[str, Any] = {
    "max_new_tokens": 1,
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "disable_compile": True,
    "guidance_scale": 1,
    "stop_strings": None,
}


class Passes:
    """Reads the tokens of a transcript through a model, and generates what follows. It has no state of its own."""

    def __init__(self, model: Any, transcript: Transcript) -> None:
        self.model = model
        self.transcript = transcript

    def check_generate(self, tokens: list[int], generate_kwargs: dict[str, Any]) -> None:
        """Refuse the arguments of an answer to unread tokens that a session or `generate` cannot take.

        Raises:
            TypeError, ValueError: naming the argument and its value.
        """
        for name in sorted(generate_kwargs.keys() & _OWN_ARGUMENTS):
            remedy = f" Bound an answer by `{name[:3]}_new_tokens`." if name.endswith("_length") else ""
            value = generate_kwargs[name]
            raise TypeError(f"`{name}` must be left out, got {value!r:.80}: the session sets it.{remedy}")
        pixels = not_text(generate_kwargs)
        if pixels is not None:
            raise TypeError(
                f"`{pixels}` must be left out: give images, videos and sound by `images=`, `videos=`, `audio=`."
            )
        model, cache = unwrapped(self.model), self.transcript.cache
        settings = GenerationSettings(model, generate_kwargs)
        for name in ("guidance_scale", "num_beams", "num_return_sequences"):
            if settings[name] not in (None, 1):
                raise ValueError(f"`{name}` must be 1, got {settings[name]}: a session is one stream.")
        for name in ASSISTED:
            if settings[name] is not None:
                raise ValueError(
                    f"`{name}` must be left out, got {settings[name]!r:.80}: sessions generate token by token."
                )
        most = settings["max_new_tokens"]
        if not isinstance(most, int | None):
            raise TypeError(f"`max_new_tokens` must be an int, got {most!r}.")
        bounded = {**generate_kwargs, "max_new_tokens": cache.window_length if most is None else most}
        check_arguments(model, self._tensor([*self.transcript.ids, *tokens]), cache, bounded)

    def read_at_once(self, message: Message, emit: Emit) -> bool:
        """Read a message up to its last image, if it has one. Return True unless the reader has left before.

        One pass reads the images: nobody can leave or fork the session while some of them are unread.
        """
        transcript, images = self.transcript, message.at_once
        if not images:
            return True
        text, images_too = message.ids[: images.start], message.ids[: images.stop]
        unread = transcript.ids[transcript.num_read :]
        # A model may have written a placeholder itself, which is text.
        is_apart = bool(text) and not message.placeholders.isdisjoint(unread)
        if is_apart or len(unread) + len(text) > transcript.cache.window_length:
            transcript.append_turn("user", text)
            if not self.read_in_chunks(emit):
                return False
            images_too = images_too[images.start :]
        with transcript.appending():
            transcript.append_turn("media", images_too)
            transcript.compact()
            seen, input_ids = transcript.num_read, self._tensor(transcript.ids)
            sink_generate(
                self.model,
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                cache=transcript.cache,
                **message.take_features(len(transcript.ids)),
                **_READ_ALONE,
            )
        emit(transcript.num_read - seen)
        return True

    def read_in_chunks(self, emit: Emit) -> bool:
        """Read all tokens but the last one, and emit how many at a time. Return True if all were read."""
        transcript, one_logit = self.transcript, last_logits_only(unwrapped(self.model))
        while (unread := len(transcript.ids) - 1 - transcript.num_read) > 0:
            transcript.compact()
            seen = transcript.num_read
            block = self._tensor(transcript.ids[seen : seen + min(unread, transcript.cache.window_length)])
            for _ in sink_prefill(self.model, block, transcript.cache, **one_logit):
                before, seen = seen, transcript.num_read
                if not emit(seen - before):
                    return False
        return True

    def generate(self, generate_kwargs: dict[str, Any], tokenizer: Any, detokenizer: Detokenizer, emit: Emit) -> None:
        """Generate until the model, a stopping criterion or the reader ends the answer, and emit its text.

        Each call of `generate` makes a part of at most a window: it keeps all its tokens and their mask.
        """
        transcript, settings = self.transcript, GenerationSettings(unwrapped(self.model), generate_kwargs)
        most, least = settings["max_new_tokens"], settings["min_new_tokens"] or 0
        ends = settings["eos_token_id"]
        ends = ends if isinstance(ends, list | tuple) else [ends]
        criteria = AnswerCriteria(settings, tokenizer)

        def take(tokens: list[int]) -> None:
            transcript.ids.extend(tokens)
            if not emit(detokenizer.push(tokens)):
                criteria.reader_left = True

        generated = 0
        window_length = transcript.cache.window_length
        while not criteria.met and (most is None or generated < most):
            transcript.compact()
            length = window_length if most is None else min(window_length, most - generated)
            arguments = {
                **generate_kwargs,
                "max_new_tokens": length,
                "min_new_tokens": min(length, max(least - generated, 0)),
                "stopping_criteria": StoppingCriteriaList([criteria]),
                "streamer": TokenStreamer(take),
            }
            new = self._generate_part(arguments)
            generated += new
            transcript.ended = transcript.ids[-1] in ends
            if new < length or transcript.ended:
                break
        if (rest := detokenizer.flush()) and not criteria.reader_left:
            emit(rest)

    def _generate_part(self, arguments: dict[str, Any]) -> int:
        """Call `generate` once, and return the number of new tokens."""
        transcript, before = self.transcript, self.transcript.num_tokens
        input_ids = self._tensor(transcript.ids)
        with compile_permission(unwrapped(self.model)) as permitted:
            if not permitted:
                arguments["disable_compile"] = True
            mask = torch.ones_like(input_ids)
            sink_generate(self.model, input_ids, attention_mask=mask, cache=transcript.cache, **arguments)
        new = transcript.num_tokens - before
        if transcript.num_read != len(transcript.ids) - 1:
            raise DriftError(
                f"`generate` handed out {new} tokens after {before}, and the cache counts "
                f"{transcript.forgotten + transcript.num_read}"
            )
        return new

    def _tensor(self, tokens: list[int]) -> Tensor:
        device = unwrapped(self.model).device
        # The weights of an offloaded model are on no device; accelerate moves inputs to where they are needed.
        return torch.tensor([tokens], device="cpu" if device.type == "meta" else device)

"""`guidance_scale`: `generate` reads a second stream, without the prompt, which gets a window of its own."""

from typing import Any

from torch import Tensor

from .cache import SinkCache
from .compat import CACHE_NAMES
from .inputs import check_token_ids, check_vocabulary
from .models import Replacement, view_of
from .prefill import asks_for_masks, first_position, run_pass
from .prompt import GenerationSettings


def guided(
    model: Any, cache: SinkCache, input_ids: Tensor | None, settings: GenerationSettings, arguments: dict[str, Any]
) -> Replacement | None:
    """Return what runs the passes of a call in the place of the model, or None without guidance.

    Those of the unconditional stream get a cache like `cache`: `generate` gives them none at first, and then the one
    that the model has returned.

    Args:
        model: the model, wrapped or not.
        cache: that of the text.
        input_ids: the prompt, if it has token ids.
        settings, arguments: those of the call.

    Raises:
        TypeError, ValueError: naming what is wrong with `negative_prompt_ids` or `negative_prompt_attention_mask`.
    """
    if settings["guidance_scale"] in (None, 1):
        return None
    view, second = view_of(model), cache.fork()
    second.reset()
    prompt = input_ids if arguments.get("inputs_embeds") is None else arguments["inputs_embeds"]
    num_rows = settings.num_repeats * (1 if prompt is None else len(prompt))
    ids, mask = (arguments.get(name) for name in ("negative_prompt_ids", "negative_prompt_attention_mask"))
    _announce_negative_prompt(view, second, num_rows, ids, mask)
    asks_mask, first = asks_for_masks(view), first_position(view)

    def forward(called: Any, *args: Any, **kwargs: Any) -> Any:
        given = next((kwargs[name] for name in CACHE_NAMES if name in kwargs), cache)
        if given is not second and (given is not None or second.get_seq_length() > 0):
            return called(*args, **kwargs)
        (input_ids,) = args
        second.make_room(input_ids.shape[1])
        return run_pass(view, input_ids, second, asks_mask, first, windowed=False, model_kwargs={})

    return forward


def _announce_negative_prompt(view: Any, second: SinkCache, num_rows: int, ids: Any, mask: Any) -> None:
    """Tell the second cache of the padding of the prompt that takes the place of the last token, if there is one."""
    if ids is not None:
        check_token_ids("negative_prompt_ids", ids, view)
        check_vocabulary("negative_prompt_ids", ids, view)
        if len(ids) != num_rows:
            raise ValueError(
                f"`negative_prompt_ids` must have {num_rows} rows, as many as are generated, got {len(ids)}."
            )
    if mask is not None:
        if ids is None or not isinstance(mask, Tensor) or mask.shape != ids.shape:
            raise ValueError("`negative_prompt_attention_mask` must have the shape of `negative_prompt_ids`.")
        try:
            second.announce_padding(mask)
        except ValueError as error:
            raise ValueError(f"`negative_prompt_attention_mask`: {error}") from None
    if ids is not None:
        with second.announced(ids.shape[1]):  # refused now if it is too long for the model
            pass

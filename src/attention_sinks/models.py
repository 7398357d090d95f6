"""The `transformers` model inside its wrappers, and a view of it for one call.

Wrappers are those of `torch.compile`, of PEFT, and of data parallel training.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

# A function that is called in the place of a method, with the method as its first argument.
Replacement = Callable[..., Any]

# Classes that wrap a model: the attribute that holds it, and whether forward passes must go through the wrapper. Those
# of the others only synchronise what training changes. Looked up, not imported: PEFT may be absent.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod", True),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "module", True),
    ("torch.nn.parallel", "DataParallel", "module", False),
    ("torch.nn.parallel", "DistributedDataParallel", "module", False),
    ("peft", "PeftModel", "base_model", False),
    ("peft", "PeftMixedModel", "base_model", False),
    ("peft.tuners.tuners_utils", "BaseTuner", "model", False),
)
# Adapters of PEFT that do more than change weights: they attend to states of their own, call the model twice, or need
# an argument in each pass.
_UNSUPPORTED_ADAPTERS = {"ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA"}


def unwrapped(model: Any) -> PreTrainedModel:
    """Return the `transformers` model inside `model`, which may be wrapped several times.

    It has the config, the weights and the methods. For forward passes use a `view_of` the wrapped model.

    Raises:
        TypeError: if there is none, or an unknown wrapper around it.
        NotImplementedError: if an adapter of PEFT does more than change weights.
    """
    while isinstance(model, _View) or not isinstance(model, PreTrainedModel):
        model, _ = _unwrapped_once(model)
    return model


def view_of(model: Any, prepare: Replacement | None = None, forward: Replacement | None = None) -> Any:
    """Return the model inside `model` as one call needs it: an object with the same weights, settings and methods.

    Its forward passes go through the wrappers. Its `generate` is that of the class of the model, even if a repository
    with `custom_generate` has put another one on the model. Nothing is set on the model, so nothing can stay behind.

    Args:
        model: the model, wrapped or not.
        prepare: called in the place of `prepare_inputs_for_generation`, with the method as its first argument.
        forward: called in the place of the model, with the model as its first argument.

    Raises:
        TypeError, NotImplementedError: see `unwrapped`.
    """
    inner = unwrapped(model)
    while model is not inner:
        inside, is_called = _unwrapped_once(model)
        if is_called:
            break
        model = inside
    prepare_inputs: Any = inner.prepare_inputs_for_generation
    if prepare is not None:  # `generate` reads the signature
        prepare_inputs = functools.wraps(prepare_inputs)(functools.partial(prepare, prepare_inputs))
    model_class: Any = type(inner)
    view: Any = object.__new__(_view_class(model_class))
    for name, value in (
        ("__dict__", vars(inner)),
        ("_view_model", model),
        ("_view_call", model if forward is None else functools.partial(forward, model)),
        ("_view_prepare", prepare_inputs),
        ("_view_replacement", prepare),
    ):
        object.__setattr__(view, name, value)
    return view


class _View:
    """What a view does in another way than the class of its model."""

    __slots__ = ()
    _view_model: Any
    _view_call: Any
    _view_prepare: Any
    _view_replacement: Replacement | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._view_call(*args, **kwargs)

    # Properties that cannot be set: they go before what the dictionary of the model holds.
    @property
    def prepare_inputs_for_generation(self) -> Any:
        return self._view_prepare

    @property
    def generate(self) -> Any:
        return super().generate  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        if self._view_replacement is not None and isinstance(value, GenerationMixin):
            return view_of(value, self._view_replacement)  # the `generate` of some models calls that of one inside
        return value

    def get_compiled_call(self, compile_config: Any) -> Any:
        """Return what `generate` calls where it compiles by itself; what is compiled must not know the view."""
        compiled = getattr(self._view_model, "get_compiled_call", None)
        return self._view_call if compiled is None else compiled(compile_config)


@functools.cache
def _view_class(model_class: Any) -> Any:
    slots = ("_view_model", "_view_call", "_view_prepare", "_view_replacement")
    attributes = {"__slots__": slots, "__module__": model_class.__module__, "__doc__": model_class.__doc__}
    return type(model_class.__name__, (_View, model_class), attributes)


def _unwrapped_once(model: Any) -> tuple[Any, bool]:
    """Return what `model` wraps, and whether forward passes must go through the wrapper."""
    if isinstance(model, _View):  # a decoding loop got it
        return model._view_model, False
    _check_adapters(model)
    for module, name, attribute, is_called in _WRAPPERS:
        wrapper = getattr(sys.modules.get(module), name, None)
        if wrapper is not None and isinstance(model, wrapper):
            return getattr(model, attribute), is_called
    children = model.named_children() if isinstance(model, nn.Module) else ()
    found = next((name for name, child in children if isinstance(child, PreTrainedModel)), None)
    way_on = "" if found is None else f" Pass `model.{found}`, which it wraps."
    raise TypeError(f"`model` must be a transformers model that can generate, got {type(model).__name__}.{way_on}")


def _check_adapters(model: Any) -> None:
    """Check that the active adapters of a PEFT model change weights alone."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or getattr(model, "_adapters_disabled", False):
        return
    for name in model.active_adapters:
        config = configs[name]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning:
            raise NotImplementedError(
                f"`model` must not have a learned prompt, got the active adapter {name!r} ({kind}): its virtual tokens "
                "are in no `input_ids`, and a cache would count them. For prompt tuning, put "
                "`model.get_prompt(batch_size)` before the embeddings of the text, and pass both as `inputs_embeds` to "
                "`sink_generate(model.get_base_model(), ...)`."
            )
        if kind in _UNSUPPORTED_ADAPTERS or getattr(config, "alora_invocation_tokens", None) is not None:
            raise NotImplementedError(
                f"`model` must not have the active adapter {name!r} ({kind}), which does more than change weights. "
                "Use an adapter like LoRA, or generate inside of `with model.disable_adapter():`."
            )

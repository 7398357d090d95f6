"""The `transformers` model inside of what wraps it: `torch.compile`, PEFT, data parallelism."""

import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Classes that wrap a model, and the attribute that holds what they wrap. Looked up, not imported: peft may be absent.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "module"),
    ("peft", "PeftModel", "base_model"),
    ("peft", "PeftMixedModel", "base_model"),
    ("peft.tuners.tuners_utils", "BaseTuner", "model"),
)
# What these adapters of PEFT do depends on where a token stands in the whole text, or they call the model twice.
_NOT_IN_WEIGHTS = {"ADAPTION_PROMPT", "SHADOW", "XLORA"}


def unwrapped(model: Any) -> PreTrainedModel:
    """Return the `transformers` model inside of `model`, however deep: what has the config, the weights and `generate`.

    Call `model` itself for a forward pass, which its wrappers may compile or shard.

    Raises:
        TypeError: if there is none, or an unknown wrapper around it.
        NotImplementedError: for adapters of PEFT that are no change of the weights alone.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        inside = _wrapped_by(inner)
        if inside is None:
            raise TypeError(f"`model` must be a transformers model, got {type(inner).__name__}.{_way_on(inner)}")
        _check_adapters(inner)
        inner = inside
    return inner


def _wrapped_by(model: Any) -> Any:
    """Return what `model` wraps, or None."""
    for module, name, attribute in _WRAPPERS:
        wrapper = getattr(sys.modules.get(module), name, None)
        if wrapper is not None and isinstance(model, wrapper):
            return getattr(model, attribute)
    return None


def _way_on(model: Any) -> str:
    """Return where the model is that a caller may have meant."""
    children = model.named_children() if isinstance(model, nn.Module) else ()
    found = next((name for name, child in children if isinstance(child, PreTrainedModel)), None)
    return "" if found is None else f" Pass `model.{found}`, which it wraps."


def _check_adapters(model: Any) -> None:
    """Check that the active adapters of a PEFT model change its weights alone."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return
    for name in model.active_adapters:
        config = configs[name]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning:
            raise NotImplementedError(
                f"`model` must not have a learned prompt, got the active adapter {name!r} ({kind}): its virtual tokens "
                "would be tokens of the stream that no `input_ids` count. For prompt tuning, put "
                "`model.get_prompt(batch_size)` before the embeddings of the text, and pass both as `inputs_embeds` to "
                "`sink_generate(model.get_base_model(), ...)`."
            )
        if kind in _NOT_IN_WEIGHTS or getattr(config, "alora_invocation_tokens", None) is not None:
            raise NotImplementedError(
                f"`model` must not have the active adapter {name!r} ({kind}): it does more than change weights, so "
                "that evicted tokens would be missed. Merge it, disable it, or use an adapter like LoRA."
            )

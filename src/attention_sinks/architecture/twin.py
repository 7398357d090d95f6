"""A twin: a small random copy of a model, built and run by the model's own code from the same config.

A twin keeps all that positions can depend on and makes the rest small. Building and running it uses nothing of the
caller's: neither random state nor default device, autocast, gradient or inference mode.
"""

import contextlib
import copy
import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer

from ..compat import CACHE_NAMES, with_cache
from .kinds import LeftOut

# Positions are probed up to here, if the model has as many. A mask over all tokens seen is given up to here.
PROBE_LENGTH = 1024
MAX_TWIN_WEIGHTS = 300_000_000


class Twin:
    """A small random model, and what it computes for a few tokens.

    Args:
        model: the model.
        left_out: the layers of the model that do not run.
        masked: True if the model is given an attention mask over all tokens seen, as for padded batches.
    """

    def __init__(self, model: PreTrainedModel, left_out: LeftOut, masked: bool = True) -> None:
        self.model = model
        self.left_out = left_out
        self.masked = masked

    @property
    def strictness(self) -> float:
        """The factor of the tolerances for logits: those of few layers change less than those of all.

        Their rounding errors are smaller, too: below 2e-6.
        """
        return 0.1 if self.left_out.layers else 1

    def unmasked(self) -> "Twin":
        """Return the same twin, run without an attention mask."""
        return Twin(self.model, self.left_out, masked=False)

    def copied(self) -> "Twin":
        """Return a copy that shares the weights, but not the buffers."""
        shared = [*self.model.parameters(), *self.left_out.layers]
        return Twin(copy.deepcopy(self.model, {id(each): each for each in shared}), self.left_out, self.masked)

    def run_at(self, positions: list[int], num_lost: int = 0) -> DynamicCache:
        """Return a cache in which the model stored one token at each of `positions`.

        Each position is a sequence of its own with nothing before it, so that only the position tells sequences apart.
        The cache reports `num_lost` more tokens than it holds.
        """
        cache = LostCache(self.model.config, num_lost)
        tokens = torch.ones(len(positions), 1, dtype=torch.long)
        self._forward(cache, input_ids=tokens, position_ids=torch.tensor(positions)[:, None])
        return cache

    def states_at(self, positions: list[int], num_lost: int = 0) -> dict[int, list[Tensor]]:
        """Return by layer that runs the states that `run_at` stores: keys, values and, if there are, indexer keys.

        States have the shape `[len(positions), num_heads, 1, head_dim]`; indexer keys have one head.
        """
        return {
            i: [layer.keys, layer.values, *([layer.indexer_keys[:, None]] if _has_indexer(layer) else [])]
            for i, layer in _attention_layers(self.run_at(positions, num_lost)).items()
        }

    def logits_at(self, position: int, num_lost: int | None = None, reverse: bool = False) -> Tensor:
        """Return the logits `[1, vocab_size]` of the last of six tokens that all stand at `position`.

        The cache reports `num_lost` more tokens than it holds; by default, as many as there are positions before.
        With `reverse`, the cached tokens swap slots before the last token is read; no key is rotated.
        """
        cache = LostCache(self.model.config, position if num_lost is None else num_lost)
        for tokens in torch.arange(1, 7)[None].split(5, dim=1):
            seen = cache.get_seq_length() + tokens.shape[1]
            output = self._forward(
                cache,
                input_ids=tokens,
                # The mask of `generate` covers all tokens seen. A short one shows whether the model reads it.
                attention_mask=tokens.new_ones(1, seen) if self.masked and seen < PROBE_LENGTH else None,
                position_ids=torch.full_like(tokens, position),
            )
            if reverse:
                for layer in _attention_layers(cache).values():
                    layer.keys, layer.values = layer.keys.flip(2), layer.values.flip(2)
                    if _has_indexer(layer):
                        layer.indexer_keys = layer.indexer_keys.flip(1)
        logits: Tensor = output["logits" if "logits" in output else "last_hidden_state"][:, -1]
        # Some models mask tokens that they must not generate (Chameleon): nothing else would be seen beside these.
        return logits.masked_fill(logits <= torch.finfo(logits.dtype).min, 0)

    def compare_layers(self, positions: list[int]) -> None:
        """Compare what layers of one kind compute for tokens at `positions`.

        Raises:
            ValueError: if they differ.
        """
        tokens = torch.arange(1, 1 + len(positions))[None]
        self._forward(
            LostCache(self.model.config, 0),
            compare_results=True,
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            position_ids=torch.tensor([positions]),
        )
        if self.left_out.differ:
            raise ValueError("layers of one kind differ")

    def _forward(self, cache: DynamicCache, compare_results: bool = False, **inputs: Tensor | None) -> Any:
        self.left_out.begin_pass(compare_results)
        with OwnRandomness():  # BigBird builds modules in its forward pass
            output = self.model(**inputs, use_cache=True, **with_cache(self.model.forward, cache))
        self.left_out.end_pass(cache.layers)
        return output


class LostCache(DynamicCache):
    """A cache that reports `num_lost` more tokens than it holds, as a `SinkCache` does after evictions."""

    def __init__(self, config: PreTrainedConfig, num_lost: int) -> None:
        super().__init__(config=config)
        self.num_lost = num_lost

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_lost + super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        kv_length, kv_offset = super().get_mask_sizes(query_length, layer_idx)
        return kv_length, self.num_lost + kv_offset


def _attention_layers(cache: DynamicCache) -> dict[int, Any]:
    layers: dict[int, Any] = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, DynamicLayer)}
    return {i: layer for i, layer in layers.items() if layer.keys is not None}


def _has_indexer(layer: Any) -> bool:
    return getattr(layer, "indexer_keys", None) is not None


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Build and run twins inside: on the CPU, without autocast and gradients, whatever the caller has set."""
    on_cpu = torch.get_default_device().type == "cpu"  # the device context costs time on every call of torch
    with (
        contextlib.nullcontext() if on_cpu else torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield


def build_twin(
    config: PreTrainedConfig, resize: Callable[[PreTrainedConfig], PreTrainedConfig], every_layer: bool = False
) -> Twin:
    """Return a twin of the model that `config` describes, as small as `resize`, one of `RESIZES`, makes it.

    The same config gives bitwise the same weights. Only one layer of each kind runs, or `every_layer`. Call it inside
    `isolated`.

    Raises:
        ValueError: if the twin would have more than `MAX_TWIN_WEIGHTS` weights.
        TypeError: if the model does not read token ids.
        Exception: whatever the code of a model raises on sizes that it does not support.
    """
    config = resize(shrink(config))
    model_class = find_model_class(config)

    def build() -> PreTrainedModel:
        model: PreTrainedModel = model_class._from_config(config, dtype=torch.float32, attn_implementation="eager")
        if not hasattr(model.get_input_embeddings(), "weight"):
            raise TypeError("a token is more than one id")  # that of CSM is one of each of its codebooks
        return model

    left_out = LeftOut()
    if every_layer:
        with OwnRandomness(), torch.device("meta"):
            _check_size(build())
    # The weights of layers that are left out are never written, and so take no memory.
    with OwnRandomness(draws_weights=every_layer):
        model = build()
        if not every_layer:
            left_out.leave_out_of(model)
            _check_size(model)
        for weight in model.parameters():  # by `data`, which is no weight that is left undrawn
            if not weight.requires_grad:  # a table of fixed sines and cosines
                continue
            # Vectors too, among them the weights of norms. A norm after the rotation commutes with it only if all its
            # weights are equal: that is so in a fresh model, but not in a trained one.
            if weight.ndim == 1:
                weight.data.uniform_(0.5, 1.5)
            else:
                weight.data.normal_(std=weight.shape[-1] ** -0.5)
    return Twin(model.eval(), left_out)


def _check_size(model: PreTrainedModel) -> None:
    num_weights = sum(weight.numel() for weight in model.parameters())
    if num_weights > MAX_TWIN_WEIGHTS:
        raise ValueError(f"the twin would have {num_weights / 1e6:,.0f} million weights")


def find_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the causal language model of a config: the registered one, or that of the module beside the config.

    The text model of a multimodal one may have no language head of its own: then it is the model without a head.

    Raises:
        ImportError, TypeError: if there is none.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    classes = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, PreTrainedModel) and each.config_class is type(config)
    ]
    for kind in (GenerationMixin, PreTrainedModel):
        for model_class in classes:
            if issubclass(model_class, kind) and (kind is GenerationMixin or names_cache(model_class)):
                return model_class
    raise TypeError(f"no model that generates is known for {type(config).__name__}")


def names_cache(model_class: type[PreTrainedModel]) -> bool:
    """Return True if `forward` has an argument for a KV cache. If not, `**kwargs` may still hand it to the layers."""
    return not inspect.signature(model_class.forward).parameters.keys().isdisjoint(CACHE_NAMES)


class OwnRandomness(TorchFunctionMode):
    """A context in which random numbers come from its own generators, never from the global ones.

    It is local to a thread. Each context draws the same numbers.

    Args:
        draws_weights: False to leave weights that learn as they are allocated.
    """

    # By name: transformers replaces functions of `torch.nn.init` by its own.
    _DRAWS = frozenset({
        "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "kaiming_normal_", "kaiming_uniform_",
        "log_normal_", "multinomial", "normal", "normal_", "orthogonal_", "poisson", "rand", "randint", "randn",
        "random_", "randperm", "sparse_", "trunc_normal_", "uniform_", "xavier_normal_", "xavier_uniform_",
    })  # fmt: skip
    # Not every supported torch gives these a generator.
    _FILLS: ClassVar[dict[str, Callable[..., Tensor]]] = {
        "rand_like": Tensor.uniform_,
        "randn_like": Tensor.normal_,
        "randint_like": Tensor.random_,
    }

    def __init__(self, draws_weights: bool = True) -> None:
        super().__init__()
        self._draws_weights = draws_weights
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in self._DRAWS and not self._draws_weights:
            weight = args[0] if args else kwargs.get("tensor")
            if isinstance(weight, nn.Parameter) and weight.requires_grad:
                return weight
        if (name in self._DRAWS or name in self._FILLS) and kwargs.get("generator") is None:
            kwargs.pop("generator", None)
            generator = self._generator_for(args, kwargs)
            if name in self._FILLS:
                like, *bounds = args
                return self._FILLS[name](torch.empty_like(like, **kwargs), *bounds, generator=generator)
            kwargs["generator"] = generator
        return func(*args, **kwargs)

    def _generator_for(self, args: Any, kwargs: Any) -> torch.Generator | None:
        """Return the generator for the device of a call. On the meta device nothing is drawn."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        # Without a tensor or `device`, functions like `torch.normal` draw on the CPU even if the default is "meta".
        device = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu"))
        if device.type == "meta":
            return None
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(0)
        return self._generators[device]


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of `config` with every size reduced that positions cannot depend on, except heads and width."""
    config = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if isinstance(value, dict):
            _shrink_tower(getattr(config, name))
        elif isinstance(value, int | list) and not isinstance(value, bool):
            for pattern, smaller in _SMALLER:
                if re.search(pattern, name):
                    setattr(config, name, smaller(value))
                    break
    if hasattr(config, "n_inner"):  # None stands for four times the width
        config.n_inner = 32
    if getattr(config, "mamba_d_ssm", None):  # Falcon-H1 says it three times: one head for each group
        config.mamba_n_heads = config.mamba_n_groups
        config.mamba_d_ssm = config.mamba_n_heads * config.mamba_d_head
    if hasattr(config, "vocabulary_map"):  # from tokens of images to ids of the whole vocabulary, or None
        config.vocabulary_map = {}
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _always(size: int) -> Callable[[Any], Any]:
    return lambda value: [size] * len(value) if isinstance(value, list) else size


def _if_any(size: int) -> Callable[[Any], Any]:
    """Return a rule that leaves 0 alone, which stands for a part that a model does not have."""
    return lambda value: _always(size)(value) if value else value


def _at_most(size: int) -> Callable[[Any], Any]:
    return lambda value: min(value, size) if isinstance(value, int) else value


# Sizes by their names: the first pattern that occurs in a name says how to reduce an int, or a list with one per layer.
_SMALLER: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    (r"_token_id$", _always(0)),
    (r"vocab_size", _always(8)),
    (r"(intermediate|ffn|ffn_hidden|expert)_(size|dim)$", _if_any(32)),
    (r"hidden_size_per_layer_input$|^laurel_rank$", _at_most(32)),
    (r"num_(local_|routed_)?experts$|^n_routed_experts$|^moe_num_experts$", _at_most(4)),
    (r"^linear_num_.*heads$", _always(1)),
    (r"experts?_per_tok(en)?$|^(moe_)?(top_?)?k(_experts)?$", _at_most(2)),
    (r"^(mamba_)?chunk_size$", _at_most(8)),
    (r"(^|_)(d_state|state_size)$", _at_most(4)),
    (r"^(n|num|num_expert|topk)_groups?$", _always(1)),
)


def _shrink_tower(tower: Any) -> None:
    """Make the part of a model for images or sound shallow: a twin reads text alone."""
    if isinstance(tower, PreTrainedConfig):
        for depth in ("num_hidden_layers", "num_blocks", "depth"):
            if isinstance(getattr(tower, depth, None), int):
                setattr(tower, depth, 1)


def _to_heads(config: PreTrainedConfig, num_heads: int) -> PreTrainedConfig:
    """Set the number of heads, and every width in proportion."""
    head_dim = getattr(config, "head_dim", None)
    derived = config.hidden_size // config.num_attention_heads
    # A `head_dim` that differs from the derived one does not depend on the width. Other sizes may depend on it.
    hidden_size, before = num_heads * (derived if head_dim in (None, derived) else 64), config.hidden_size
    for name, value in config.to_dict().items():
        if (name.endswith(("width", "hidden_size")) and value and value % before == 0) or name == "mamba_headdim":
            setattr(config, name, hidden_size * value // before)
    config.hidden_size = hidden_size  # by whatever name
    config.num_attention_heads = num_heads
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None) is not None:
            setattr(config, name, num_heads)
    return config


def _to_one_head(config: PreTrainedConfig) -> PreTrainedConfig:
    return _to_heads(config, 1)


def _to_four_heads(config: PreTrainedConfig) -> PreTrainedConfig:
    return _to_heads(config, 4)


def _to_one_group(config: PreTrainedConfig) -> PreTrainedConfig:
    """Divide the width and every number of heads by one divisor, for models that tie other sizes to them."""
    heads = {
        name: value
        for name, value in config.to_dict().items()
        if re.search(r"(^|_)(num|n)_.*heads$|_n_heads$", name) and isinstance(value, int) and value > 0
    }
    num_heads = config.num_attention_heads
    divisor = math.gcd(config.hidden_size, num_heads, *heads.values())
    for name, value in heads.items():
        setattr(config, name, value // divisor)
    config.num_attention_heads = num_heads // divisor  # by whatever name
    config.hidden_size //= divisor
    return config


def _to_one_head_each(config: PreTrainedConfig) -> PreTrainedConfig:
    """Give every layer one head. Configs whose layers differ in their numbers of heads can only be made anew."""
    settings = config.to_dict()
    for values in (settings, *settings["per_layer_config"].values()):
        values.update(dict.fromkeys(values.keys() & {"num_attention_heads", "num_key_value_heads"}, 1))
    return type(config)(**{**settings, "hidden_size": 64})


# Ways to reduce the heads and the width of a shrunk config, to be tried in this order.
RESIZES: tuple[Callable[[PreTrainedConfig], PreTrainedConfig], ...] = (
    _to_one_head,
    _to_four_heads,
    _to_one_group,
    _to_one_head_each,
)

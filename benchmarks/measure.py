"""What the benchmarks share: models of a real shape with random weights, full caches, and timing in turns."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, StaticCache
from transformers.cache_utils import CacheLayerMixin

from attention_sinks import SinkCache
from attention_sinks.compat import cache_name

CACHE = cache_name()  # as the installed version of transformers calls it

SMOLLM2_135M = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """Where and how large a benchmark runs."""

    shape: dict[str, Any]
    window_lengths: tuple[int, ...]
    rounds: int
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    def model(self, num_layers: int | None = None) -> Any:
        config = LlamaConfig(**self.shape, max_position_embeddings=2**20)
        config.num_hidden_layers = num_layers or config.num_hidden_layers
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


class _FloorLayer(CacheLayerMixin):
    """Stores nothing and returns as many keys as a full window has: the model's own time remains."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, states: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = states, states.clone()
        self.seen = states.shape[2]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.seen += key_states.shape[2]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], self.seen + query_length - self.keys.shape[2]

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length


def random_states(config: PreTrainedConfig, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    head_dim = config.hidden_size // config.num_attention_heads
    return torch.randn(1, config.num_key_value_heads, length, head_dim, device=device, dtype=dtype)


def filled(cache: Cache, config: PreTrainedConfig, length: int, device: torch.device, dtype: torch.dtype) -> Cache:
    """A cache that has seen `length` tokens."""
    for layer_idx in range(config.num_hidden_layers):
        states = random_states(config, length, device, dtype)
        cache.update(states, states, layer_idx)
    return cache


def full_cache(name: str, model: Any, window_length: int) -> Any:
    """A full cache of the kind `name` for a model."""
    config, device, dtype = model.config, model.device, model.dtype
    if name == "floor":
        states = [random_states(config, window_length, device, dtype) for _ in range(config.num_hidden_layers)]
        return Cache(layers=[_FloorLayer(one) for one in states])
    cache: Any
    if name == "StaticCache":
        # Its last slot is written again and again: it has no room for more.
        cache = filled(StaticCache(config, max_cache_len=window_length), config, window_length - 1, device, dtype)
    elif name == "DynamicCache":
        cache = filled(DynamicCache(config=config), config, window_length - 1, device, dtype)
    else:
        cache = filled(SinkCache(config, window_length), config, window_length, device, dtype)
    return cache


def step_of(name: str, forward: Any, model: Any, window_length: int) -> Callable[[], None]:
    """Decode one token with a full cache."""
    cache = full_cache(name, model, window_length)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)

    def step() -> None:
        forward(token, **{CACHE: cache}, use_cache=True)
        if name == "StaticCache":
            for layer in cache.layers:
                layer.cumulative_length.fill_(window_length - 1)
        elif name == "DynamicCache":
            cache.crop(-1)

    return step


def waiting_for(device: torch.device) -> Callable[[], object]:
    """A function that waits until the device has done all it was told."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def in_turns(
    candidates: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, repeats: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call of the candidates, which take turns so that a drift of the machine meets them all."""
    wait = waiting_for(device)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 3):
        names = list(candidates)
        for name in names if round_ % 2 else reversed(names):
            candidates[name]()  # its buffers back into the caches
            wait()
            start = time.perf_counter()
            for _ in range(repeats):
                candidates[name]()
            wait()
            if round_ >= 3:
                times[name].append((time.perf_counter() - start) / repeats)
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


def spread(values: list[float], digits: int) -> str:
    low, median, high = quartiles(values)
    return f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def ratios(times: list[float], base: list[float]) -> list[float]:
    """Round by round."""
    return [one / other for one, other in zip(times, base, strict=True)]


def nbytes(cache: Any) -> int:
    """The bytes of all tensors that the layers of a cache hold."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors_of(cache.layers)}.values()
    )


def _tensors_of(layers: list[Any]) -> Iterator[Tensor]:
    for layer in layers:
        yield from (value for value in vars(layer).values() if isinstance(value, Tensor))

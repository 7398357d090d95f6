"""Shared parts of the benchmarks: models of a real shape with random weights, full caches, alternating timing."""

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

CACHE = cache_name()  # name of the cache argument in the installed version of transformers

SMOLLM2_135M = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
# Its text model.
QWEN2_5_VL_3B = {
    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 2, "vocab_size": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip


ALL_ROTATED = "all keys rotated in each step"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """Model shape, window lengths, number of rounds, device and dtype of a benchmark."""

    shape: dict[str, Any]
    window_lengths: tuple[int, ...]
    rounds: int
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    def model(self, num_layers: int | None = None) -> Any:
        """Return a Llama model of this shape, with `num_layers` layers if given."""
        config = LlamaConfig(**self.shape, max_position_embeddings=2**20)
        config.num_hidden_layers = num_layers or config.num_hidden_layers
        torch.manual_seed(0)
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(default_dtype)


class _FloorLayer(CacheLayerMixin):
    """Cache layer that stores nothing and returns the keys of a full window. Only the time of the model remains."""

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


class _RotatingLayer(_FloorLayer):
    """A full cache layer that rotates all its keys anew in each step, by the angles of their places in the cache."""

    def __init__(self, states: Tensor) -> None:
        super().__init__(states)
        angles = torch.arange(states.shape[2])[:, None] * 1e4 ** -torch.linspace(0, 1, states.shape[3] // 2)
        self.cos, self.sin = (each.to(states).repeat(1, 2) for each in (angles.cos(), angles.sin()))
        self.slot = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.seen += 1
        self.slot = (self.slot + 1) % self.keys.shape[2]
        self.keys[:, :, self.slot], self.values[:, :, self.slot] = key_states[:, :, 0], value_states[:, :, 0]
        first, second = self.keys.chunk(2, dim=-1)
        return self.keys * self.cos + torch.cat([-second, first], dim=-1) * self.sin, self.values


def random_states(config: PreTrainedConfig, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    head_dim = config.hidden_size // config.num_attention_heads
    return torch.randn(1, config.num_key_value_heads, length, head_dim, device=device, dtype=dtype)


def fill(cache: Cache, config: PreTrainedConfig, length: int, device: torch.device, dtype: torch.dtype) -> Cache:
    """Update a cache with `length` random tokens and return it."""
    for layer_idx in range(config.num_hidden_layers):
        states = random_states(config, length, device, dtype)
        cache.update(states, states, layer_idx)
    return cache


def full_cache(name: str, model: Any, window_length: int) -> Any:
    """Return a full cache for a model; `name` is its class, `"floor"`, or `ALL_ROTATED`."""
    config, device, dtype = model.config, model.device, model.dtype
    if name in ("floor", ALL_ROTATED):
        layer_class = _FloorLayer if name == "floor" else _RotatingLayer
        states = [random_states(config, window_length, device, dtype) for _ in range(config.num_hidden_layers)]
        return Cache(layers=[layer_class(layer_states) for layer_states in states])
    cache: Any
    if name == "StaticCache":
        # One slot stays free. Every decode step writes to it.
        cache = fill(StaticCache(config, max_cache_len=window_length), config, window_length - 1, device, dtype)
    elif name == "DynamicCache":
        cache = fill(DynamicCache(config=config), config, window_length - 1, device, dtype)
    else:
        cache = fill(SinkCache(config, window_length), config, window_length, device, dtype)
    return cache


def decode_step(name: str, forward: Any, model: Any, window_length: int) -> Callable[[], None]:
    """Return a function that decodes one token with a full cache, which keeps its length."""
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


def synchronizer(device: torch.device) -> Callable[[], object]:
    """Return a function that waits until the device has finished all its work."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def time_alternately(
    candidates: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, repeats: int = 1
) -> dict[str, list[float]]:
    """Return the seconds per call of each candidate, for each round.

    The candidates alternate, so that a slower machine in between affects all of them.
    """
    synchronize = synchronizer(device)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 3):
        names = list(candidates)
        for name in names if round_ % 2 else reversed(names):
            candidates[name]()  # warm up the CPU caches
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                candidates[name]()
            synchronize()
            if round_ >= 3:
                times[name].append((time.perf_counter() - start) / repeats)
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


def median_and_quartiles(values: list[float], digits: int) -> str:
    """Return the median with the quartiles in brackets, for a table."""
    low, median, high = quartiles(values)
    return f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def ratios(times: list[float], reference: list[float]) -> list[float]:
    """Return the ratio of the times in each round."""
    return [seconds / base for seconds, base in zip(times, reference, strict=True)]


def nbytes(cache: Any) -> int:
    """Return the bytes of all tensors in the layers of a cache. Shared storage counts once."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors_of(cache.layers)}.values()
    )


def _tensors_of(layers: list[Any]) -> Iterator[Tensor]:
    for layer in layers:
        yield from (value for value in vars(layer).values() if isinstance(value, Tensor))
        if getattr(layer, "rotation", None) is not None:
            yield layer.sinks

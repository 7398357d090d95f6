"""The cost of one cache update past the window, for one layer: python -m benchmarks.update_cost

The immutable ring of SinkCache beside the textbook form of the same rule, which concatenates the new key, drops the
evicted one and rotates every recent key back by one position. Same shapes, same run, medians over many updates.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig

from attention_sinks import SinkCache


def cat_and_rerotate(window_length: int, num_sink_tokens: int, inv_freq: Tensor, states: Tensor) -> Callable[[], None]:
    """An update of a full cache that rewrites the window, as in transformers before 4.53 and in llama.cpp."""
    keys = states.repeat(1, 1, window_length, 1)
    values = keys.clone()
    angles = torch.cat([inv_freq, inv_freq])
    cos, sin = angles.cos(), -angles.sin()

    def update() -> None:
        nonlocal keys, values
        recent = keys[:, :, num_sink_tokens + 1 :]
        first, second = recent.chunk(2, dim=-1)
        rotated = recent * cos + torch.cat([-second, first], dim=-1) * sin
        keys = torch.cat([keys[:, :, :num_sink_tokens], rotated, states], dim=2)
        values = torch.cat([values[:, :, :num_sink_tokens], values[:, :, num_sink_tokens + 1 :], states], dim=2)

    return update


def ring(config: LlamaConfig, window_length: int, num_sink_tokens: int, states: Tensor) -> Callable[[], None]:
    """An update of a full SinkCache of one layer."""
    cache = SinkCache(config, window_length, num_sink_tokens)
    prompt = torch.randn(*states.shape[:2], window_length, states.shape[3], dtype=states.dtype)
    cache.update(prompt, prompt, layer_idx=0)
    return lambda: void(cache.update(states, states, layer_idx=0))


def void(_: object) -> None:
    """Drop a result."""


def microseconds(updates: dict[str, Callable[[], None]], repeats: dict[str, int]) -> dict[str, list[float]]:
    """Microseconds of every update; the candidates take turns, so that a drift of the machine meets them all."""
    times: dict[str, list[float]] = {name: [] for name in updates}
    rounds = 40
    for _ in range(rounds):
        for name, update in updates.items():
            update()  # its buffers back into the caches
            start = time.perf_counter()
            for _ in range(repeats[name]):
                update()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window-lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--rerotate-window-length", type=int, default=4096)
    parser.add_argument("--num-sink-tokens", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    num_heads, head_dim, num_sinks = arguments.num_heads, arguments.head_dim, arguments.num_sink_tokens
    config = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=num_heads, head_dim=head_dim, hidden_size=num_heads * head_dim
    )
    states = torch.randn(1, num_heads, 1, head_dim)
    inv_freq = 1e4 ** -(torch.arange(0, head_dim, 2) / head_dim)
    rerotate = f"cat and rerotate, W = {arguments.rerotate_window_length:,}"
    updates = {f"ring, W = {w:,}": ring(config, w, num_sinks, states) for w in arguments.window_lengths}
    updates[rerotate] = cat_and_rerotate(arguments.rerotate_window_length, num_sinks, inv_freq, states)
    with torch.inference_mode():
        times = microseconds(updates, {name: 2 if name == rerotate else 200 for name in updates})

    base = statistics.median(next(iter(times.values())))
    print(f"one layer, {num_heads} KV heads x {head_dim}, float32, S = {num_sinks}, {torch.get_num_threads()} threads")
    print(f"{'':32}{'median us':>10}{'quartiles us':>20}{'ratio':>8}")
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(f"{name:32}{median:>10.1f}{f'{low:.1f} to {high:.1f}':>20}{median / base:>8.2f}")


if __name__ == "__main__":
    main()

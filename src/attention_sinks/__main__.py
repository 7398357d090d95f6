"""Demo, `python -m attention_sinks`: stream text from a real model well past the window, then print a report."""

import argparse
import sys
import time
from typing import Any

import torch
from transformers import TextStreamer, set_seed
from transformers.utils import logging

from . import SinkCache, sink_generate
from .cache import DEFAULT_NUM_SINK_TOKENS
from .load import load_model

_PROMPT = "Write a long diary of a voyage around the world on a small sailing boat, day by day."


class _TimedStreamer(TextStreamer):
    """Streamer that prints text and records times: `times[0]` for the prompt, `times[i]` for new token `i`."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]


def _tokens_per_second(times: list[float]) -> str:
    return f"{(len(times) - 1) / (times[-1] - times[0]):.1f}" if len(times) > 1 else "(no token)"


def _report(cache: SinkCache, times: list[float], prompt_length: int) -> str:
    states = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    num_bytes = sum(t.nbytes for t in states)
    dynamic_bytes = sum(t.nbytes // t.shape[2] for t in states) * cache.get_seq_length()
    window_full = max(cache.window_length - prompt_length, 0)  # index of the new token that fills the window
    return "\n".join(
        [
            f"tokens generated     {len(times) - 1}",
            f"tokens kept          {cache.kept_length} of {cache.get_seq_length()}",
            f"cache memory         {num_bytes / 2**20:.1f} MiB (DynamicCache: {dynamic_bytes / 2**20:.1f} MiB)",
            f"tokens per second    {_tokens_per_second(times[1 : window_full + 1])} before the window was full, "
            f"{_tokens_per_second(times[max(window_full, 1) :])} after",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser("python -m attention_sinks", description=__doc__)
    parser.add_argument("--model", help="Hub id or folder of the model (default: SmolLM2-135M-Instruct from its wheel)")
    parser.add_argument("--prompt", default=_PROMPT, help="text that the model answers (default: %(default)r)")
    for flag, default, meaning in (
        ("--window-length", 128, "number of tokens that the cache keeps, sink tokens included"),
        ("--num-sink-tokens", DEFAULT_NUM_SINK_TOKENS, "number of first tokens that are never evicted"),
        ("--max-new-tokens", 300, "number of tokens to generate"),
        ("--seed", 0, "seed of the random number generator"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="device that runs the model (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="data type of the weights (default: %(default)s)",
    )
    options = parser.parse_args(arguments)

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, tokenizer = load_model(options.model, getattr(torch, options.dtype), options.device)
        if tokenizer.chat_template is None:
            inputs = tokenizer(options.prompt, return_tensors="pt")
        else:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": options.prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        cache = SinkCache(model.config, options.window_length, options.num_sink_tokens)
        streamer = _TimedStreamer(tokenizer)
        set_seed(options.seed)
        sink_generate(
            model,
            **inputs.to(options.device),
            cache=cache,
            max_new_tokens=options.max_new_tokens,
            min_new_tokens=options.max_new_tokens,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            repetition_penalty=1.1,
            streamer=streamer,
        )
    except (OSError, TypeError, ValueError, NotImplementedError) as error:
        sys.exit(f"attention_sinks: {error}")
    print("\n" + _report(cache, streamer.times, inputs["input_ids"].shape[1]))


if __name__ == "__main__":
    main()

"""The command line `attention-sinks`: chat, generate, perplexity, info."""

import contextlib
import io
import sys
import time
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError as error:
    print(f'attention-sinks: {error}. Install it with: pip install "attention-sinks[cli]"', file=sys.stderr)
    raise SystemExit(2) from None

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TextStreamer, set_seed
from transformers.utils import logging

from .cache import DEFAULT_NUM_SINK_TOKENS, SinkCache
from .compat import with_cache
from .evaluate import binned, curves, perplexity_from, plot, write_csv
from .generate import sink_generate
from .load import load_model, source_of
from .prefill import default_chunk_size
from .session import SinkSession
from .storage.layers import SinkLayer

app = typer.Typer(
    help="Attention sinks: language models that run for ever in constant memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
_HELP = "/reset forgets the conversation, /save FILE writes it down, /exit leaves; Ctrl-C stops an answer."


class Dtype(StrEnum):
    """The types of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Baseline(StrEnum):
    """What a `SinkCache` is compared with."""

    dense = "dense"
    window = "window"
    recompute = "recompute"


ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="A Hub id or a folder; by default SmolLM2-135M from its wheel.")
]
WindowOption = Annotated[int, typer.Option("--window-length", "-w", help="The most tokens the model sees.")]
SinksOption = Annotated[int, typer.Option("--num-sink-tokens", "-s", help="How many first tokens are never forgotten.")]
DeviceOption = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, mps.")]
DtypeOption = Annotated[Dtype, typer.Option(help="The type of the weights.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0 always takes the most probable token.")]
SeedOption = Annotated[int, typer.Option(help="Of the random numbers.")]


@app.command()
def chat(
    model: ModelOption = None,
    window_length: WindowOption = 1024,
    num_sink_tokens: SinksOption = DEFAULT_NUM_SINK_TOKENS,
    system: Annotated[str | None, typer.Option(help="A system prompt; it is never forgotten.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens of an answer.")] = None,
    temperature: TemperatureOption = 0.7,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Talk with a model without end. The status line counts tokens; memory does not grow."""
    loaded, tokenizer = _load(model, dtype, device)
    session = SinkSession(loaded, tokenizer, window_length, num_sink_tokens, system=system)
    if tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer of this model has no chat template. Choose a model that was trained to chat, or use "
            "`attention-sinks generate`."
        )
    set_seed(seed)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": 0.9}
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    out.print(f"[dim]{_HELP}[/dim]")
    spoken: list[tuple[str, str]] = []
    while True:
        try:
            message = out.input("\n[bold green]> [/bold green]").strip()
        except EOFError:
            out.print()
            return
        except KeyboardInterrupt:
            out.print(f"\n[dim]{_HELP}[/dim]")
            continue
        command, _, argument = message.partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            session.reset()
            spoken.clear()
            out.print("[dim]forgotten[/dim]")
        elif command == "/save":
            _save(spoken, argument.strip())
        elif command.startswith("/"):
            out.print(f"[dim]{_HELP}[/dim]")
        elif message:
            try:
                _answer(session, message, options, spoken)
            except (TypeError, ValueError) as error:  # a message that cannot be encoded, for instance
                _complain(error)


def _answer(session: SinkSession, message: str, options: dict[str, Any], spoken: list[tuple[str, str]]) -> None:
    """Stream an answer, until its end or Ctrl-C, and the status line below it."""
    pieces: list[str] = []
    answer = session.chat(message, **options)
    began, before = time.perf_counter(), session.tokens_seen
    try:
        for piece in answer:
            if not pieces:
                began, before = time.perf_counter(), session.tokens_seen
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        out.print(" [dim](stopped)[/dim]", end="")
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            answer.close()
    seconds = max(time.perf_counter() - began, 1e-9)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in session.cache.layers if layer.is_initialized)
    out.print(
        f"\n[dim]{session.tokens_seen:,} tokens seen · {session.kept_length:,} kept · {held / 2**20:.1f} MiB · "
        f"{(session.tokens_seen - before) / seconds:.1f} tokens per second[/dim]"
    )
    spoken += [("user", message), ("assistant", "".join(pieces))]


def _save(spoken: list[tuple[str, str]], path: str) -> None:
    if not path:
        out.print("[dim]/save needs the name of a file[/dim]")
        return
    try:
        Path(path).write_text("".join(f"## {role}\n\n{text}\n\n" for role, text in spoken), encoding="utf-8")
    except OSError as error:
        out.print(f"[red]{escape(str(error))}[/red]")
    else:
        out.print(f"[dim]{len(spoken)} messages in {escape(path)}[/dim]")


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    file: Annotated[Path | None, typer.Option(help="A text file (UTF-8) to continue instead.")] = None,
    model: ModelOption = None,
    window_length: WindowOption = 256,
    num_sink_tokens: SinksOption = DEFAULT_NUM_SINK_TOKENS,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write at most.")] = 500,
    temperature: TemperatureOption = 0.7,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Continue a text, past the window, on the standard output."""
    if (prompt is None) == (file is None):
        raise ValueError("Give either PROMPT or `--file`.")
    text = prompt if file is None else _read_text(file)
    if not text:
        raise ValueError("There is nothing to continue: the text is empty.")
    loaded, tokenizer = _load(model, dtype, device)
    inputs = tokenizer(text, return_tensors="pt").to(device)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": 0.9}
    set_seed(seed)
    cache = SinkCache(loaded.config, window_length, num_sink_tokens)
    # A text longer than the window is read as `SinkSession.feed` reads one.
    is_long = inputs["input_ids"].shape[1] > window_length
    print(text, end="")
    with contextlib.suppress(KeyboardInterrupt):
        sink_generate(
            loaded,
            **inputs,
            **sampling,
            cache=cache,
            prefill_chunk_size=default_chunk_size(loaded, cache) if is_long else None,
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )


@app.command()
def perplexity(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="Text files (UTF-8), joined in this order.")],
    model: ModelOption = None,
    window_length: WindowOption = 256,
    num_sink_tokens: Annotated[str, typer.Option("--num-sink-tokens", "-s", help="Numbers, with commas.")] = "0,4",
    baselines: Annotated[str, typer.Option(help=f"Of {', '.join(Baseline)}, with commas.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Score no more than so many.")] = None,
    recompute_every: Annotated[int, typer.Option(min=1, help="Recomputation scores one token of so many.")] = 16,
    output: Annotated[Path, typer.Option("--output", "-o", help="The CSV and PNG, without ending.")] = Path(
        "perplexity"
    ),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Perplexity along a text through a window with sinks, and through what the paper compares it with."""
    numbers = _numbers(num_sink_tokens, window_length)
    chosen = [name.strip() for name in baselines.split(",") if name.strip()]
    for name in chosen:
        if name not in list(Baseline):
            raise ValueError(f"`--baselines` must be of {', '.join(Baseline)}, got {name!r}.")
    if not numbers and not chosen:
        raise ValueError("There is nothing to measure: give `--num-sink-tokens` or `--baselines`.")
    text = "\n".join(map(_read_text, texts))
    if not output.absolute().parent.is_dir():  # said now, not after an hour
        raise ValueError(f"`--output` must lie in a folder that exists, got {output}.")
    loaded, tokenizer = _load(model, dtype, device)
    input_ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :max_tokens].to(device)
    length = input_ids.shape[1]
    if length <= window_length:
        raise ValueError(
            f"The text must be longer than the window, got {length} tokens and --window-length {window_length}."
        )
    bin_length = max(length // 40, 1)
    found, rows = curves(loaded, input_ids, window_length, numbers, chosen, recompute_every), {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err) as progress:
        tasks = {name: progress.add_task(name, total=length) for name in found}
        for name, scores in found.items():
            seen = []
            for piece in scores:
                seen.append(piece)
                progress.update(tasks[name], completed=int(piece.positions[-1]) + 1)
            progress.update(tasks[name], completed=length)
            rows[name] = binned(seen, bin_length)
    csv, png = (output.with_name(output.name + ending) for ending in (".csv", ".png"))
    write_csv(rows, csv)
    trained = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", None)
    name = "SmolLM2-135M-Instruct" if model is None else Path(model).name
    plot(rows, png, f"{name}, window of {window_length:,} tokens", trained)
    table = Table("cache", "perplexity past the window", "in the last quarter")
    for name, bins in rows.items():
        late = (f"{perplexity_from(bins, first):,.2f}" for first in (window_length, length * 3 // 4))
        table.add_row(name, *late)
    out.print(table)
    out.print(f"{csv} and {png} have the curves.", soft_wrap=True)


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="A Hub id or a folder; by default SmolLM2-135M.")] = None,
    window_length: WindowOption = 1024,
    num_sink_tokens: SinksOption = DEFAULT_NUM_SINK_TOKENS,
    dtype: DtypeOption = Dtype.bfloat16,
) -> None:
    """Whether a model is supported, how its keys turn, and what a window costs. Needs its config alone."""
    name, options = source_of(model)
    config = AutoConfig.from_pretrained(name, **options)
    cache = SinkCache(config, window_length, num_sink_tokens)
    ring_bytes, other_bytes = _bytes_of(config, cache, getattr(torch, dtype))
    table = Table(show_header=False, box=None)
    table.add_row("model type", config.model_type)
    table.add_row("verdict", "supported: exact")
    for rotation, layers in _rotations(cache).items():
        table.add_row(f"layers {_ranges(layers)}", rotation)
    others = Counter(_kind(layer) for layer in cache.layers if not isinstance(layer, SinkLayer))
    for kind, count in others.items():
        table.add_row(f"{count} other layers", kind)
    ends = f"at {cache.position_limit:,}"
    if cache.can_rebase:
        ends += "; sink_generate and SinkSession wind them back before"
    table.add_row("positions end", ends)
    table.add_row(
        "chunks", "of any size, each token with its own window" if cache.supports_windowed_chunks else "of one token"
    )
    table.add_row("memory", f"{ring_bytes / window_length * 1000 / 2**20:.2f} MiB for 1,000 tokens of window, {dtype}")
    table.add_row("", f"{ring_bytes / 2**20:.2f} MiB for this window of {window_length:,}")
    if other_bytes > 0:
        table.add_row("", f"{other_bytes / 2**20:.2f} MiB for the other layers after the first token")
    out.print(table)


def _rotations(cache: SinkCache) -> dict[str, list[int]]:
    """How keys turn, in words, and in which layers."""
    found: dict[str, list[int]] = {}
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, SinkLayer):
            continue
        rotation = layer.rotation
        if rotation is None:
            words = (
                "distances by the order of tokens (ALiBi)" if cache.needs_temporal_order else "no position in the keys"
            )
        else:
            lengths = 2 * torch.pi / rotation.inv_freq[rotation.inv_freq > 0].double()
            words = (
                f"{rotation.rotary_dim} dimensions from {rotation.start} on turn, "
                f"{'neighbours in pairs' if rotation.interleaved else 'halves in pairs'}, once in "
                f"{float(lengths.min()):,.1f} to {float(lengths.max()):,.0f} tokens"
            )
        found.setdefault(words, []).append(i)
    return found


def _ranges(numbers: list[int]) -> str:
    """`0-3, 5` for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _kind(layer: Any) -> str:
    sliding = getattr(layer, "sliding_window", None)
    return f"keep the last {sliding:,} tokens, without sinks" if sliding else "keep a state of constant size, or none"


def _bytes_of(config: Any, cache: SinkCache, dtype: torch.dtype) -> tuple[int, int]:
    """What the rings of a cache hold, and the other layers after one token: found by a forward pass without numbers."""
    with torch.device("meta"), torch.no_grad():
        # The type in which transformers has every kernel.
        skeleton: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        skeleton(torch.zeros(1, 1, dtype=torch.long), use_cache=True, **with_cache(skeleton.forward, cache))
    sizes = [0, 0]
    for layer in cache.layers:
        for each in (layer, getattr(layer, "indexer", None)):
            if each is not None and getattr(each, "keys", None) is not None:
                elements = each.keys.numel() + each.values.numel()
                sizes[0 if isinstance(layer, SinkLayer) else 1] += elements * dtype.itemsize
    return sizes[0], sizes[1]


def _load(model: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    # Some libraries draw progress bars that cannot be switched off.
    with out.status("Loading the model"), contextlib.redirect_stderr(io.StringIO()):
        return load_model(model, getattr(torch, dtype), device)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}). Convert it: iconv -t UTF-8.") from None


def _numbers(listed: str, window_length: int) -> list[int]:
    numbers = []
    for part in filter(None, map(str.strip, listed.split(","))):
        if not part.isdecimal() or int(part) >= window_length:
            raise ValueError(
                f"`--num-sink-tokens` must be numbers from 0 to below the window of {window_length}, got {part!r}."
            )
        numbers.append(int(part))
    return numbers


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a user can set right is said in one line."""
    try:
        yield
    except (OSError, TypeError, ValueError, NotImplementedError, ImportError, RuntimeError) as error:
        _complain(error)
        raise SystemExit(2) from None


def _complain(error: Exception) -> None:
    message = " ".join(str(error).split())
    err.print(f"attention-sinks: {message}", markup=False, emoji=False, soft_wrap=True)


def main() -> None:
    """Run the command line."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with _one_line_errors():
        app()


if __name__ == "__main__":
    main()

"""Command line `attention-sinks` with the commands chat, generate, perplexity, recall and info."""

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
    print(f'attention-sinks: {error}. Install it with: pip install "attention-sinks[cli]>=1"', file=sys.stderr)
    raise SystemExit(2) from None

import torch
from transformers import AutoConfig, TextStreamer, set_seed
from transformers.utils import logging

from .cache import DEFAULT_NUM_SINK_TOKENS, SinkCache
from .describe import cache_bytes, layer_memory, position_encodings, ranges
from .evaluate import Scores, binned, curve_name, curves, logits_along, perplexity_from, plot, write_csv
from .generate import sink_generate
from .load import load_model, source_of
from .prefill import default_chunk_size
from .recall import MAX_LINES, Question, answers, make_stream, plot_recall, recall_by_distance, write_recall
from .session import SinkSession
from .storage.layers import SinkLayer

app = typer.Typer(
    help="Run language models indefinitely in constant memory, with attention sinks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
_CHAT_HELP = "/reset clears the conversation, /save FILE saves it as text, /exit quits. Ctrl-C stops an answer."


class Dtype(StrEnum):
    """Data types of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Baseline(StrEnum):
    """Baselines of the perplexity of a `SinkCache`."""

    dense = "dense"
    window = "window"
    recompute = "recompute"


ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Hub id or folder of the model; by default SmolLM2-135M-Instruct."),
]
WindowOption = Annotated[
    int,
    typer.Option("--window-length", "-w", help="Maximum number of tokens in the cache, sink tokens included."),
]
SinksOption = Annotated[
    int, typer.Option("--num-sink-tokens", "-s", help="Number of first tokens that are never evicted.")
]
DeviceOption = Annotated[str, typer.Option(help="Device that runs the model, for example cpu, cuda or mps.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Data type of the weights.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 selects greedy decoding.")]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", help="Path of the CSV and PNG files, without the extension.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of the random number generator.")]


@app.command()
def chat(
    model: ModelOption = None,
    window_length: WindowOption = 1024,
    num_sink_tokens: SinksOption = DEFAULT_NUM_SINK_TOKENS,
    system: Annotated[str | None, typer.Option(help="System prompt; it is never evicted.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Maximum number of tokens per answer.")] = None,
    temperature: TemperatureOption = 0.7,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Chat with a model without a length limit. Memory does not grow; a status line counts tokens."""
    loaded, tokenizer = _load(model, dtype, device)
    session = SinkSession(loaded, tokenizer, window_length, num_sink_tokens, system=system)
    if tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer of this model has no chat template. Choose a model that was trained to chat, or use "
            "`attention-sinks generate`."
        )
    set_seed(seed)
    options = _sampling_options(temperature)
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    out.print(f"[dim]{_CHAT_HELP}[/dim]")
    transcript: list[tuple[str, str]] = []
    while True:
        try:
            message = out.input("\n[bold green]> [/bold green]").strip()
        except EOFError:
            out.print()
            return
        except KeyboardInterrupt:
            out.print(f"\n[dim]{_CHAT_HELP}[/dim]")
            continue
        command, _, argument = message.partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            session.reset()
            transcript.clear()
            out.print("[dim]conversation cleared[/dim]")
        elif command == "/save":
            _save(transcript, argument.strip())
        elif command.startswith("/"):
            out.print(f"[dim]{_CHAT_HELP}[/dim]")
        elif message:
            try:
                _answer(session, message, options, transcript)
            except (TypeError, ValueError) as error:  # a message that cannot be encoded, for example
                _print_error(error)


def _sampling_options(temperature: float) -> dict[str, Any]:
    """Return the options of `generate` for a temperature."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": 0.9}


def _answer(session: SinkSession, message: str, options: dict[str, Any], transcript: list[tuple[str, str]]) -> None:
    """Stream an answer until it ends or Ctrl-C is pressed, then print a status line."""
    pieces: list[str] = []
    answer = session.chat(message, **options)
    start, seen_at_start = time.perf_counter(), session.tokens_seen
    try:
        for piece in answer:
            if not pieces:
                start, seen_at_start = time.perf_counter(), session.tokens_seen
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        out.print(" [dim](stopped)[/dim]", end="")
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            answer.close()
    seconds = max(time.perf_counter() - start, 1e-9)
    num_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in session.cache.layers if layer.is_initialized)
    out.print(
        f"\n[dim]{session.tokens_seen:,} tokens seen · {session.kept_length:,} kept · {num_bytes / 2**20:.1f} MiB · "
        f"{(session.tokens_seen - seen_at_start) / seconds:.1f} tokens per second[/dim]"
    )
    transcript += [("user", message), ("assistant", "".join(pieces))]


def _save(transcript: list[tuple[str, str]], path: str) -> None:
    """Write a conversation to a Markdown file."""
    if not path:
        out.print("[dim]/save needs the name of a file[/dim]")
        return
    try:
        Path(path).write_text("".join(f"## {role}\n\n{text}\n\n" for role, text in transcript), encoding="utf-8")
    except OSError as error:
        out.print(f"[red]{escape(str(error))}[/red]")
    else:
        out.print(f"[dim]{len(transcript)} messages in {escape(path)}[/dim]")


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue.")] = None,
    file: Annotated[Path | None, typer.Option(help="UTF-8 text file to continue, instead of PROMPT.")] = None,
    model: ModelOption = None,
    window_length: WindowOption = 256,
    num_sink_tokens: SinksOption = DEFAULT_NUM_SINK_TOKENS,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")] = 500,
    temperature: TemperatureOption = 0.7,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Continue a text past the window, and print it."""
    if (prompt is None) == (file is None):
        raise ValueError("Give either PROMPT or `--file`.")
    text = prompt if file is None else _read_text(file)
    if not text:
        raise ValueError("There is nothing to continue: the text is empty.")
    loaded, tokenizer = _load(model, dtype, device)
    inputs = tokenizer(text, return_tensors="pt").to(device)
    set_seed(seed)
    cache = SinkCache(loaded.config, window_length, num_sink_tokens)
    # Chunked prefill for a prompt longer than the window, as in `SinkSession.feed`.
    is_long = inputs["input_ids"].shape[1] > window_length
    print(text, end="")
    with contextlib.suppress(KeyboardInterrupt):
        sink_generate(
            loaded,
            **inputs,
            **_sampling_options(temperature),
            cache=cache,
            prefill_chunk_size=default_chunk_size(loaded, cache) if is_long else None,
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )


@app.command()
def perplexity(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="UTF-8 text files, joined in this order.")],
    model: ModelOption = None,
    window_length: WindowOption = 256,
    num_sink_tokens: Annotated[
        str,
        typer.Option("--num-sink-tokens", "-s", help="Numbers of sink tokens to compare, separated by commas."),
    ] = "0,4",
    baselines: Annotated[
        str, typer.Option(help=f"Baselines to compare, separated by commas: {', '.join(Baseline)}.")
    ] = "",
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Maximum number of tokens to read.")] = None,
    recompute_every: Annotated[
        int, typer.Option(min=1, help="Distance between the tokens that the recompute baseline scores.")
    ] = 16,
    output: OutputOption = Path("perplexity"),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Measure perplexity along a text, with sink tokens and with the baselines of the paper."""
    numbers = _numbers("--num-sink-tokens", num_sink_tokens, 0, window_length, "--window-length")
    chosen = [name.strip() for name in baselines.split(",") if name.strip()]
    for name in chosen:
        if name not in list(Baseline):
            raise ValueError(f"`--baselines` must be names from {', '.join(Baseline)}, got {name!r}.")
    if not numbers and not chosen:
        raise ValueError("There is nothing to measure: give `--num-sink-tokens` or `--baselines`.")
    text = "\n".join(map(_read_text, texts))
    csv, png = _output_files(output)
    loaded, tokenizer = _load(model, dtype, device)
    input_ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :max_tokens].to(device)
    length = input_ids.shape[1]
    if length <= window_length:
        raise ValueError(
            f"The text must be longer than the window, got {length} tokens and --window-length {window_length}."
        )
    rows = _score(curves(loaded, input_ids, window_length, numbers, chosen, recompute_every), length)
    write_csv(rows, csv)
    context_length = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", None)
    plot(rows, png, f"{_name_of(model)}, window of {window_length:,} tokens", context_length)
    table = Table("cache", "perplexity past the window", "perplexity in the last quarter")
    for name, bins in rows.items():
        table.add_row(name, *(f"{perplexity_from(bins, first):,.2f}" for first in (window_length, length * 3 // 4)))
    out.print(table)
    out.print(f"Curves written to {csv} and {png}.", soft_wrap=True)


def _score(scores: dict[str, Iterator[Scores]], length: int) -> dict[str, list[dict[str, Any]]]:
    """Score a text of `length` tokens with every cache, with progress bars. Return the perplexity of 40 bins."""
    rows = {}
    with _progress() as progress:
        tasks = {name: progress.add_task(name, total=length) for name in scores}
        for name, chunks in scores.items():
            scored = []
            for chunk in chunks:
                scored.append(chunk)
                progress.update(tasks[name], completed=int(chunk.positions[-1]) + 1)
            progress.update(tasks[name], completed=length)
            rows[name] = binned(scored, max(length // 40, 1))
    return rows


@app.command()
def recall(
    model: ModelOption = None,
    window_length: WindowOption = 1024,
    num_sink_tokens: SinksOption = DEFAULT_NUM_SINK_TOKENS,
    distances: Annotated[
        str, typer.Option(help="Distances from a question back to the line it asks for, in lines, separated by commas.")
    ] = "10,20,30,40,50,60,70,80",
    num_lines: Annotated[int, typer.Option(max=MAX_LINES, help="Number of lines of each stream.")] = 200,
    num_streams: Annotated[int, typer.Option(min=1, help="Number of streams of random lines.")] = 3,
    output: OutputOption = Path("recall"),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Measure how far back a model finds a fact, with all tokens in the cache, a window, and a window with sinks."""
    chosen = _numbers("--distances", distances, 1, num_lines, "--num-lines")
    csv, png = _output_files(output)
    loaded, tokenizer = _load(model, dtype, device)
    streams = [make_stream(tokenizer, num_lines, chosen, seed) for seed in range(num_streams)]
    rows = {}
    with _progress() as progress:
        for number in (None, 0, num_sink_tokens):
            answered: list[tuple[Question, bool]] = []
            for input_ids, questions in progress.track(streams, description=curve_name(number)):
                answered += answers(logits_along(loaded, input_ids.to(device), window_length, number), questions)
            rows[curve_name(number)] = recall_by_distance(answered)
    write_recall(rows, csv)
    plot_recall(rows, png, f"{_name_of(model)}, window of {window_length:,} tokens", window_length - num_sink_tokens)
    table = Table("lines back", "tokens back", "questions", *rows)
    for recalls in zip(*rows.values(), strict=True):
        distance, token_distance, num_questions, _ = recalls[0]
        accuracies = (f"{each.accuracy:.0%}" for each in recalls)
        table.add_row(f"{distance}", f"{token_distance:,}", f"{num_questions}", *accuracies)
    out.print(table)
    out.print(f"Recall written to {csv} and {png}.", soft_wrap=True)


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(help="Hub id or folder of the model; by default SmolLM2-135M-Instruct.")
    ] = None,
    window_length: WindowOption = 1024,
    num_sink_tokens: SinksOption = DEFAULT_NUM_SINK_TOKENS,
    dtype: DtypeOption = Dtype.bfloat16,
) -> None:
    """Show if a model is supported, its position encoding, and the memory of a window. Reads only the config."""
    name, options = source_of(model)
    config = AutoConfig.from_pretrained(name, **options)
    cache = SinkCache(config, window_length, num_sink_tokens)
    sink_bytes, other_bytes = cache_bytes(config, cache, getattr(torch, dtype))
    table = Table(show_header=False, box=None)
    table.add_row("model type", config.model_type)
    table.add_row("verdict", "supported: exact")
    for encoding, layers in position_encodings(cache).items():
        table.add_row(f"layers {ranges(layers)}", encoding)
    others = Counter(layer_memory(layer) for layer in cache.layers if not isinstance(layer, SinkLayer))
    for memory, count in others.items():
        table.add_row(f"{count} other layers", memory)
    limit = f"{cache.position_limit:,}"
    if cache.can_rebase:
        limit += " (sink_generate and SinkSession rebase positions automatically)"
    table.add_row("max position", limit)
    chunk_size = (
        "any chunk size, each token with exactly its own window"
        if cache.supports_windowed_chunks
        else "one token at a time"
    )
    table.add_row("chunked prefill", chunk_size)
    table.add_row("memory", f"{sink_bytes / window_length * 1000 / 2**20:.2f} MiB for 1,000 tokens of window, {dtype}")
    table.add_row("", f"{sink_bytes / 2**20:.2f} MiB for this window of {window_length:,}")
    if other_bytes > 0:
        table.add_row("", f"{other_bytes / 2**20:.2f} MiB for the other layers after the first token")
    out.print(table)


def _load(model: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """Return the model and its tokenizer. Show a spinner while they load."""
    # Hide stderr: some libraries write progress bars to it and have no option to turn them off.
    with out.status("Loading the model"), contextlib.redirect_stderr(io.StringIO()):
        return load_model(model, getattr(torch, dtype), device)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start}). Convert it from its encoding, for example: "
            "iconv -f LATIN1 -t UTF-8."
        ) from None


def _numbers(option: str, listed: str, first: int, bound: int, bound_option: str) -> list[int]:
    """Return the numbers, from `first` to below `bound`, in a list that is separated by commas."""
    numbers = []
    for part in filter(None, map(str.strip, listed.split(","))):
        if not part.isdecimal() or not first <= int(part) < bound:
            raise ValueError(
                f"`{option}` must be numbers from {first} to {bound - 1} (below `{bound_option}`), got {part!r}."
            )
        numbers.append(int(part))
    return numbers


def _output_files(output: Path) -> tuple[Path, Path]:
    """Return the paths of the CSV and PNG files. Call this before the measurement, which may take an hour."""
    if not output.absolute().parent.is_dir():
        raise ValueError(f"`--output` must be in an existing folder, got {output}.")
    return output.with_name(output.name + ".csv"), output.with_name(output.name + ".png")


def _name_of(model: str | None) -> str:
    return "SmolLM2-135M-Instruct" if model is None else Path(model).name


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=err)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Print an error as one line and exit with code 2."""
    try:
        yield
    except (OSError, TypeError, ValueError, NotImplementedError, ImportError, RuntimeError) as error:
        _print_error(error)
        raise SystemExit(2) from None


def _print_error(error: Exception) -> None:
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

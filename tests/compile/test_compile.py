"""A model is compiled once for a stream of any length, and gives the logits of the eager model."""

from typing import Any

import pytest
import torch

from attention_sinks import SinkCache, sink_generate, sink_prefill

from ..support.compiling import Compiler, compile_everywhere
from ..support.inside import force_static, position_offset_of, rebase_every, set_position_limit
from ..support.models import CACHE, VOCAB_SIZE, build_config, build_model, random_ids, relative_error
from ..support.streams import S, W
from ..support.versions import HAS_LATER_MODELS

MORE = [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("gpt_neox", "qwen3", "glm4", "mistral-sliding")]
ARCHITECTURES = ["llama", "deepseek_v3", "smollm3", *MORE]


pytestmark = pytest.mark.usefixtures("_forget_what_was_compiled", "no_grad")


def build(name: str) -> Any:
    return build_model(build_config(name, num_hidden_layers=2))


def compiled(model: Any, backend: Any) -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


@pytest.mark.parametrize("prompt_length", [1, 3, 6, 40])
def test_a_compiled_loop_gives_the_logits_of_an_eager_one_across_the_edge_of_the_window(prompt_length: int) -> None:
    model = build("llama")
    compiler = Compiler()
    step = compiled(model, compiler)
    for seed in range(2):
        cache, eager = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
        prompt = random_ids(prompt_length, seed=seed)
        model(prompt, **{CACHE: cache})
        model(prompt, **{CACHE: eager})
        for t in range(3 * W):
            token = random_ids(1, seed=100 + t)
            logits = step(token, **{CACHE: cache}).logits
            assert relative_error(logits, model(token, **{CACHE: eager}).logits) < 1e-5
        assert compiler.compiled == 1, "one graph, past the window and for another cache too"
        assert (cache.get_seq_length(), cache.kept_length) == (eager.get_seq_length(), eager.kept_length)
        for length in (5, 1, 1, 7):  # the stream continues without the compiler
            new = random_ids(length, seed=length)
            expected = model(new, **{CACHE: eager}).logits
            assert relative_error(model(new, **{CACHE: cache}).logits, expected) < 1e-5


def test_a_fork_after_compiled_steps_needs_no_graph_of_its_own() -> None:
    """Below the window and past it; Python does not know yet how many tokens the steps have counted."""
    model, compiler = build("llama"), Compiler()
    step, token = compiled(model, compiler), random_ids(1)
    cache, eager = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    for each in (cache, eager):
        model(random_ids(6), **{CACHE: each})
    for _ in range(2):
        for _ in range(8):
            step(token, **{CACHE: cache})
            model(token, **{CACHE: eager})
        fork = cache.fork()
        for t in range(W):
            token = random_ids(1, seed=t)
            logits = step(token, **{CACHE: cache}).logits
            assert torch.equal(step(token, **{CACHE: fork}).logits, logits)
            assert relative_error(logits, model(token, **{CACHE: eager}).logits) < 1e-5
        assert fork.get_seq_length() == cache.get_seq_length() == eager.get_seq_length()
    assert compiler.compiled == 1


def test_a_thousand_steps_past_the_window_are_compiled_once() -> None:
    model = build("llama")
    compiler = Compiler()
    step, cache = compiled(model, compiler), SinkCache(model.config, W, S)
    model(random_ids(2 * W), **{CACHE: cache})
    token = random_ids(1)
    for _ in range(1000):
        step(token, **{CACHE: cache})
    assert compiler.compiled == 1
    assert cache.get_seq_length() == 2 * W + 1000


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised and ignored by torch
def test_a_step_compiled_by_inductor_is_exact() -> None:
    model = build("llama")
    step = compiled(model, "inductor")
    cache, eager = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    for new in [random_ids(6), *random_ids(2 * W, seed=1).split(1, dim=1)]:
        expected = model(new, **{CACHE: eager}).logits
        logits = (step if new.shape[1] == 1 else model)(new, **{CACHE: cache}).logits
        assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.usefixtures("_as_on_cuda")
def test_generate_compiles_a_sink_cache_where_it_compiles_a_static_cache(name: str) -> None:
    model = build(name)
    for ids in (random_ids(6), random_ids(40)):
        expected: Any = sink_generate(model, ids, window_length=W, max_new_tokens=40, disable_compile=True)
        compiler = Compiler()
        settings: dict[str, Any] = {"max_new_tokens": 40, "compile_config": compile_everywhere(compiler)}
        output: Any = sink_generate(model, ids, window_length=W, **settings)
        assert torch.equal(output, expected)
        output = model.generate(ids, **{CACHE: SinkCache(model.config, W, S)}, **settings)
        assert torch.equal(output, expected)
        assert compiler.compiled == 1


@pytest.mark.skipif(not HAS_LATER_MODELS, reason="early transformers 5 has no such layers")
@pytest.mark.parametrize("name", ["lfm2", pytest.param("qwen3_next", marks=pytest.mark.exhaustive)])
@pytest.mark.usefixtures("_as_on_cuda")
def test_models_with_convolutions_and_linear_attention_are_compiled(name: str) -> None:
    model, ids, compiler = build_model(build_config(name)), random_ids(20), Compiler()
    settings: dict[str, Any] = {"window_length": W, "max_new_tokens": 30}
    expected: Any = sink_generate(model, ids, disable_compile=True, **settings)
    output: Any = sink_generate(model, ids, compile_config=compile_everywhere(compiler, fullgraph=False), **settings)
    assert torch.equal(output, expected)
    assert compiler.compiled > 0


@pytest.mark.usefixtures("_as_on_cuda")
def test_assisted_decoding_is_exact_where_generate_compiles() -> None:
    model, ids = build("llama"), random_ids(8).repeat(1, 3)
    settings: dict[str, Any] = {"window_length": 64, "max_new_tokens": 30, "do_sample": False}
    settings["eos_token_id"] = VOCAB_SIZE - 1  # early transformers 5 looks for an end among the candidates
    expected: Any = sink_generate(model, ids, disable_compile=True, **settings)
    output: Any = sink_generate(model, ids, prompt_lookup_num_tokens=4, **settings)
    assert torch.equal(output, expected)


@pytest.mark.usefixtures("_as_on_cuda")
def test_padded_rows_and_beams_are_compiled_exactly() -> None:
    model = build("llama")
    ids, mask = random_ids(12, batch_size=3), torch.ones(3, 12, dtype=torch.long)
    mask[0, :7], mask[1, :2] = 0, 0
    more: dict[str, Any] = {"attention_mask": mask, "window_length": W, "max_new_tokens": 40, "pad_token_id": 0}
    for strategy in ({"do_sample": False}, {"num_beams": 2}):
        compiler = Compiler()
        expected: Any = sink_generate(model, ids, disable_compile=True, **more, **strategy)
        output: Any = sink_generate(model, ids, compile_config=compile_everywhere(compiler), **more, **strategy)
        assert torch.equal(output, expected)
        assert compiler.compiled == (0 if "num_beams" in strategy else 1)


@pytest.mark.usefixtures("_as_on_cuda")
def test_compiled_generate_notices_the_position_limit() -> None:
    model = build("llama")
    ids = random_ids(6)
    expected: Any = sink_generate(model, ids, window_length=W, max_new_tokens=60, disable_compile=True)
    compiler = Compiler()
    settings: dict[str, Any] = {"max_new_tokens": 60, "compile_config": compile_everywhere(compiler)}
    cache = SinkCache(model.config, W, S)
    set_position_limit(cache, 40)
    with pytest.raises(ValueError, match="position 40"):
        model.generate(ids, **{CACHE: cache}, **settings)
    assert cache.get_seq_length() == 40
    assert compiler.compiled == 1
    cache = SinkCache(model.config, W, S)
    set_position_limit(cache, 40)
    output: Any = sink_generate(model, ids, past_key_values=cache, **settings)
    assert torch.equal(output, expected)
    assert 0 < position_offset_of(cache) < 65 < cache.get_seq_length() + 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("prompt_length", [3, 40])
def test_layers_compiled_one_by_one_are_exact(prompt_length: int) -> None:
    """The mask is made in eager mode and does not hide empty slots."""
    model, eager = build("llama"), build("llama")
    for layer in model.model.layers:
        layer.compile(backend=Compiler())
    cache, other = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    for ids in (random_ids(prompt_length), *random_ids(6, seed=1).split(1, dim=1)):
        expected = eager(ids, **{CACHE: other}).logits
        assert relative_error(model(ids, **{CACHE: cache}).logits, expected) < 1e-5
    assert cache.get_seq_length() == other.get_seq_length()


@pytest.mark.usefixtures("_as_on_cuda")
def test_a_rebase_does_not_cause_a_recompilation(monkeypatch: pytest.MonkeyPatch) -> None:
    rebase_every(monkeypatch, 40)
    model, ids, compiler = build("llama"), random_ids(6), Compiler()
    expected: Any = sink_generate(model, ids, window_length=W, max_new_tokens=200, disable_compile=True)
    output: Any = sink_generate(
        model, ids, window_length=W, max_new_tokens=200, compile_config=compile_everywhere(compiler),
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(output.sequences, expected)
    assert position_offset_of(output[CACHE]) > 100, "more than once"
    assert compiler.compiled == 1


@pytest.mark.exhaustive
def test_a_rebase_is_exact_where_the_user_compiled_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    rebase_every(monkeypatch, 40)
    model, compiled_model, ids = build("llama"), build("llama"), random_ids(6)
    compiled_model.forward = torch.compile(compiled_model.forward, backend=Compiler())
    settings: dict[str, Any] = {"window_length": W, "max_new_tokens": 120, "disable_compile": True}
    outputs: list[Any] = [sink_generate(each, ids, **settings) for each in (compiled_model, model)]
    assert torch.equal(*outputs)


@pytest.mark.exhaustive
def test_a_crop_and_compiled_steps_may_alternate() -> None:
    model = build("llama")
    step = compiled(model, Compiler())
    cache, eager = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    new = random_ids(10)
    for forward, one in ((step, cache), (model, eager)):
        model(new, **{CACHE: one})
        for t in range(20):
            forward(random_ids(1, seed=t), **{CACHE: one})
        one.crop(-3)
    assert cache.kept_length == eager.kept_length == W - 3
    again: Any = torch.compile(model, backend=Compiler())
    for t in range(6):
        token = random_ids(1, seed=50 + t)
        position = torch.tensor([[27 + t]])
        expected = model(token, position_ids=position, **{CACHE: eager}).logits
        assert relative_error(again(token, position_ids=position, **{CACHE: cache}).logits, expected) < 1e-5
    assert cache.get_seq_length() == eager.get_seq_length() == 33


@pytest.mark.parametrize("name", ["gptj", "mpt"])
@pytest.mark.usefixtures("_as_on_cuda")
def test_a_model_that_needs_python_at_every_step_is_not_compiled(name: str) -> None:
    """GPT-J has a table of positions that ends, and MPT needs keys in order."""
    model = build_model(build_config(name))
    assert not SinkCache(model.config, W, S).is_compileable


@pytest.mark.usefixtures("_as_on_cuda")
def test_flash_attention_is_not_compiled_because_it_takes_no_mask() -> None:
    config = build_config("llama")
    for implementation in (None, "sdpa", "flash_attention_2"):
        config._attn_implementation = implementation
        assert SinkCache(config, W, S).is_compileable == (implementation != "flash_attention_2")


@pytest.mark.exhaustive
def test_compiled_chunks_are_exact() -> None:
    model = build("llama")
    forward: Any = torch.compile(model, backend=Compiler())
    cache, eager = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    for length in (6, 1, 5, 1, 1, 20, 1, 3, 1):
        new = random_ids(length, seed=length)
        expected = model(new, **{CACHE: eager}).logits
        assert relative_error(forward(new, **{CACHE: cache}).logits, expected) < 1e-5


@pytest.mark.parametrize("prompt_length", [1, 3, 6, 15, 40])
@pytest.mark.usefixtures("_as_on_cuda")
def test_an_eager_loop_is_exact_where_generate_would_compile(
    prompt_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = build("llama"), random_ids(60)
    parts = [ids[:, :prompt_length], *ids[:, prompt_length:].split(1, dim=1)]
    cache = SinkCache(model.config, W, S)
    assert cache.is_compileable
    logits: list[Any] = [model(part, **{CACHE: cache}).logits for part in parts]
    assert not cache.is_compileable
    with monkeypatch.context() as patch:
        force_static(patch, False)
        cache = SinkCache(model.config, W, S)
        for part, one in zip(parts, logits, strict=True):
            assert relative_error(one, model(part, **{CACHE: cache}).logits) < 1e-5


def test_windowed_chunks_after_compiled_steps_are_exact() -> None:
    model = build("llama")
    step = compiled(model, Compiler())
    ids = random_ids(70)
    cache, eager = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    expected: list[Any] = [model(token, **{CACHE: eager}).logits for token in ids.split(1, dim=1)]
    model(ids[:, :6], **{CACHE: cache})
    for token in ids[:, 6:40].split(1, dim=1):
        step(token, **{CACHE: cache})
    logits: list[Any] = [output.logits for output in sink_prefill(model, ids[:, 40:], cache, chunk_size=7)]
    assert relative_error(torch.cat(logits, dim=1), torch.cat(expected[40:], dim=1)) < 1e-5

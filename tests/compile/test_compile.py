"""A compiled model: compiled once however long the stream, with the logits of the eager one; and what a step costs."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from attention_sinks import SinkCache, sink_generate, sink_prefill

from ..support.counting import Operations, storages
from ..support.inside import buffers, force_static, position_offset_of, rebase_every, set_position_limit
from ..support.models import CACHE, VOCAB_SIZE, build_config, build_model, random_ids, relative_error
from ..support.streams import S, W
from ..support.versions import HAS_LATER_MODELS

ARCHITECTURES = ["llama", "gpt_neox", "qwen3", "glm4", "deepseek_v3", "smollm3", "mistral-sliding"]


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


@pytest.fixture
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` compiles on CUDA only, unless it is told to do so everywhere."""
    force_static(monkeypatch)


class Compiler:
    """A back end that counts what it is given to compile."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.compiled += 1
        return graph.forward

    def __deepcopy__(self, memo: Any) -> "Compiler":  # `generate` copies its settings
        return self


def compile_everywhere(compiler: Compiler, fullgraph: bool = True) -> CompileConfig:
    config = CompileConfig(backend=compiler, fullgraph=fullgraph, mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


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
        assert compiler.compiled == 1, "neither at the edge of the window nor for another cache"
        assert (cache.get_seq_length(), cache.kept_length) == (eager.get_seq_length(), eager.kept_length)
        for length in (5, 1, 1, 7):  # the stream goes on without the compiler
            new = random_ids(length, seed=length)
            expected = model(new, **{CACHE: eager}).logits
            assert relative_error(model(new, **{CACHE: cache}).logits, expected) < 1e-5


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
def test_inductor_compiles_a_step_too() -> None:
    model = build("llama")
    step = compiled(model, "inductor")
    cache, eager = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    for new in [random_ids(6), *random_ids(2 * W, seed=1).split(1, dim=1)]:
        expected = model(new, **{CACHE: eager}).logits
        logits = (step if new.shape[1] == 1 else model)(new, **{CACHE: cache}).logits
        assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.usefixtures("_as_on_cuda")
def test_generate_compiles_by_itself_where_it_does_so_for_a_static_cache(name: str) -> None:
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


@pytest.mark.skipif(not HAS_LATER_MODELS, reason="early transformers 5 has other layers")
@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
@pytest.mark.usefixtures("_as_on_cuda")
def test_convolutions_and_linear_attention_in_other_layers_are_compiled_too(name: str) -> None:
    model, ids, compiler = build_model(build_config(name)), random_ids(20), Compiler()
    settings: dict[str, Any] = {"window_length": W, "max_new_tokens": 30}
    expected: Any = sink_generate(model, ids, disable_compile=True, **settings)
    output: Any = sink_generate(model, ids, compile_config=compile_everywhere(compiler, fullgraph=False), **settings)
    assert torch.equal(output, expected)
    assert compiler.compiled > 0


@pytest.mark.usefixtures("_as_on_cuda")
def test_assisted_decoding_is_not_disturbed() -> None:
    model, ids = build("llama"), random_ids(8).repeat(1, 3)
    settings: dict[str, Any] = {"window_length": 64, "max_new_tokens": 30, "do_sample": False}
    settings["eos_token_id"] = VOCAB_SIZE - 1  # early transformers 5 looks for it among the candidates
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
def test_the_end_of_positions_is_seen_in_compiled_generate() -> None:
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


@pytest.mark.parametrize("prompt_length", [3, 40])
def test_layers_that_are_compiled_one_by_one_are_exact(prompt_length: int) -> None:
    """Their masks are made outside of what is compiled, and hide no empty slots."""
    model, eager = build("llama"), build("llama")
    for layer in model.model.layers:
        layer.compile(backend=Compiler())
    cache, other = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    for ids in (random_ids(prompt_length), *random_ids(6, seed=1).split(1, dim=1)):
        expected = eager(ids, **{CACHE: other}).logits
        assert relative_error(model(ids, **{CACHE: cache}).logits, expected) < 1e-5
    assert cache.get_seq_length() == other.get_seq_length()


@pytest.mark.usefixtures("_as_on_cuda")
def test_positions_that_are_wound_back_are_no_reason_to_compile_anew(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_crop_after_compiled_steps_is_exact_and_a_compiled_step_after_a_crop() -> None:
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
def test_what_must_be_counted_at_every_step_is_not_compiled(name: str) -> None:
    """GPT-J has a table of positions, and MPT counts distances by the order of the tokens."""
    model = build_model(build_config(name))
    assert not SinkCache(model.config, W, S).is_compileable


@pytest.mark.usefixtures("_as_on_cuda")
def test_attention_that_is_given_no_mask_gets_no_empty_slots() -> None:
    config = build_config("llama")
    for implementation in (None, "sdpa", "flash_attention_2"):
        config._attn_implementation = implementation
        assert SinkCache(config, W, S).is_compileable == (implementation != "flash_attention_2")


def operations_of_a_step(num_layers: int, window_length: int, dtype: torch.dtype = torch.float32) -> Operations:
    cache = SinkCache(build_config("llama", num_hidden_layers=num_layers), window_length, S)
    operations = Operations()
    for length in (window_length, 1, 1):
        states = torch.randn(1, 2, length, 16).to(dtype)
        operations = Operations()
        with operations:
            for layer_idx in range(num_layers):
                cache.update(states, states, layer_idx)
    return operations  # of the last, for which nothing is made ready any more


def test_a_step_writes_the_token_and_the_sinks_and_does_nothing_else_for_each_layer() -> None:
    """Launches are the cost on a GPU: three for each layer, and a few for all of them together."""
    few, many = operations_of_a_step(2, 64), operations_of_a_step(10, 64)
    assert many.names - few.names == Counter({"index_copy_": 3 * 8})
    assert few.names.total() - 3 * 2 <= 12
    assert operations_of_a_step(2, 4096).names == few.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_allocates_no_more_than_the_sinks(dtype: torch.dtype) -> None:
    window_length, num_layers = 4096, 3
    sinks = num_layers * 2 * S * 16 * 4
    assert 0 < operations_of_a_step(num_layers, window_length, dtype).largest <= sinks


@pytest.mark.parametrize("prompt_length", [3, 40])
def test_no_step_waits_for_the_device(prompt_length: int) -> None:
    """Nothing is read from a tensor: not by the cache, and not by the model on its behalf."""
    model = build("llama")
    cache = SinkCache(model.config, W, S)
    model(random_ids(prompt_length), **{CACHE: cache})
    operations = Operations()
    with operations:
        for t in range(2 * W):
            model(random_ids(1, seed=t), **{CACHE: cache})
    assert operations.names["index_copy_"] > 0
    assert not operations.names.keys() & {"_local_scalar_dense", "item", "nonzero", "is_nonzero"}


def test_a_chunk_costs_the_same_however_long_the_stream() -> None:
    model = build("llama")
    cache = SinkCache(model.config, W, S)
    costs = []
    for length in (100, 2991):  # to the same place in the ring
        list(sink_prefill(model, random_ids(length), cache, chunk_size=100))
        operations = Operations()
        with operations:
            list(sink_prefill(model, random_ids(9), cache, chunk_size=9))
        costs.append((operations.names, operations.largest))
    assert costs[0] == costs[1]


def test_the_memory_of_a_cache_is_that_of_its_window() -> None:
    """In bfloat16 the pristine sinks weigh most."""
    config = build_config("llama", num_hidden_layers=3)
    for dtype in (torch.float32, torch.bfloat16):
        cache = SinkCache(config, 256, S)
        for length in (300, 1, 1, 7, 1):
            states = torch.randn(1, 2, length, 16).to(dtype)
            for layer_idx in range(3):
                cache.update(states, states, layer_idx)
        held = storages([buffers(layer) for layer in cache.layers])
        assert sum(held.values()) <= 2 * 3 * 2 * 256 * 16 * dtype.itemsize * 1.02


def test_chunks_can_be_compiled_if_less_well() -> None:
    model = build("llama")
    forward: Any = torch.compile(model, backend=Compiler())
    cache, eager = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    for length in (6, 1, 5, 1, 1, 20, 1, 3, 1):
        new = random_ids(length, seed=length)
        expected = model(new, **{CACHE: eager}).logits
        assert relative_error(forward(new, **{CACHE: cache}).logits, expected) < 1e-5


@pytest.mark.parametrize("prompt_length", [1, 3, 6, 15, 40])
@pytest.mark.usefixtures("_as_on_cuda")
def test_an_eager_loop_where_generate_would_compile_is_exact_and_soon_as_elsewhere(
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


def test_chunks_after_compiled_steps_see_their_windows() -> None:
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

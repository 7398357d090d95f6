"""A wrapped model generates and reads what it does without its wrappers, whose forward is used where it matters."""

import contextlib
import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed
import transformers
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from attention_sinks import SinkCache, sink_generate, sink_prefill

from ..support.models import CACHE, SIZES, build_config, build_model, random_ids, relative_error
from ..support.streams import NEW_STREAM, OPTIONS, S, W, prefilled


class Runs:
    """A backend of `torch.compile` that counts how often compiled code runs."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.number += 1
            return graph.forward(*args)

        return run


def tiny() -> Any:
    return build_model(build_config("llama"))


def with_lora(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"], **options)
    return peft.get_peft_model(model, config).eval()


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


def sharded(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def offloaded(model: Any) -> Any:
    import accelerate

    return accelerate.cpu_offload(model)


def prepared(model: Any) -> Any:
    import accelerate

    return accelerate.Accelerator(cpu=True).prepare(model)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "torch.compile": functools.partial(torch.compile, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "compiled, then data parallel": lambda x: nn.parallel.DistributedDataParallel(torch.compile(x, backend="eager")),
    "fully_shard": sharded,
    "accelerate, offloaded": offloaded,
    "accelerate, prepared": prepared,
}


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # early transformers 5, if offloaded
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_computes_what_it_does_without(wrap: Any, process_group: None) -> None:
    model, ids = tiny(), random_ids(40)
    expected: Any = sink_generate(model, ids[:, :10], max_new_tokens=30, **NEW_STREAM)
    logits = prefilled(model, ids, SinkCache(model.config, W, S), 7)
    wrapped = wrap(model)
    output: Any = sink_generate(wrapped, ids[:, :10], max_new_tokens=30, **NEW_STREAM)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.allclose(prefilled(wrapped, ids, SinkCache(model.config, W, S), 7), logits, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_adapters_are_applied(compiled: bool, task: str | None) -> None:
    model, ids = with_lora(tiny(), task_type=task), random_ids(10)
    inner = model.get_base_model()
    cache = SinkCache(model.config, W, S)
    options = {key: value for key, value in OPTIONS.items() if key != "return_dict_in_generate"}
    with torch.no_grad():
        expected = inner.generate(ids, **{CACHE: cache}, max_new_tokens=30, **options)
        without = sink_generate(tiny(), ids, window_length=W, max_new_tokens=30, **options)
    wrapped = torch.compile(model, backend="eager") if compiled else model
    assert torch.equal(sink_generate(wrapped, ids, window_length=W, max_new_tokens=30, **options), expected)  # type: ignore[arg-type]
    assert not torch.equal(expected, without)  # type: ignore[arg-type]
    with model.disable_adapter():
        assert torch.equal(sink_generate(wrapped, ids, window_length=W, max_new_tokens=30, **options), without)  # type: ignore[arg-type]


def test_compiled_code_runs_in_every_pass() -> None:
    torch.compiler.reset()  # compilations of other tests count towards the limit
    model, runs = tiny(), Runs()
    compiled: Any = torch.compile(model, backend=runs)
    sink_generate(compiled, random_ids(10), max_new_tokens=30, **NEW_STREAM)
    assert runs.number == 30
    list(sink_prefill(compiled, random_ids(21), SinkCache(model.config, W, S), 7))
    assert runs.number == 33


class _Ending(BaseStreamer):
    def __init__(self, model: Any, error: BaseException | None) -> None:
        self.model, self.error = model, error

    def put(self, value: Any) -> None:
        assert "prepare_inputs_for_generation" not in vars(self.model)
        pickle.dumps(self.model)
        if self.error is not None:
            raise self.error

    def end(self) -> None: ...


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), ValueError("stop")], ids=repr)
def test_nothing_is_set_on_a_model_at_any_time(error: BaseException | None) -> None:
    model = tiny()
    wrapped, before = torch.compile(model, backend="eager"), set(vars(model))
    with contextlib.suppress(KeyboardInterrupt, ValueError):
        sink_generate(wrapped, random_ids(10), streamer=_Ending(model, error), max_new_tokens=3, **NEW_STREAM)  # type: ignore[arg-type]
    assert set(vars(model)) == before


LEARNED: dict[str, Callable[[], Any]] = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
}


@pytest.mark.parametrize("kind", LEARNED)
def test_a_learned_prompt_is_refused_by_name(kind: str) -> None:
    model: Any = peft.get_peft_model(tiny(), LEARNED[kind]())
    ids, cache = random_ids(10), SinkCache(model.config, W, S)
    for call in (
        lambda: sink_generate(model, ids, cache=cache, max_new_tokens=3),
        lambda: sink_prefill(model, ids, cache),
    ):
        with pytest.raises(NotImplementedError, match=f"`model` must not have a learned prompt.*{kind}.*inputs_embeds"):
            call()
    assert cache.get_seq_length() == 0


def test_a_learned_prompt_before_the_embeddings_is_exact() -> None:
    """The way that the error names: below the window each token is the one that PEFT's own forward pass gives."""
    model: Any = peft.get_peft_model(tiny(), LEARNED["PROMPT_TUNING"]()).eval()
    ids, inner = random_ids(10), model.get_base_model()
    embeddings = torch.cat([model.get_prompt(1), inner.get_input_embeddings()(ids)], dim=1)
    output: Any = sink_generate(
        inner, inputs_embeds=embeddings, max_new_tokens=20, **{**NEW_STREAM, "window_length": 64}
    )
    for i, logits in enumerate(output.logits):
        text = torch.cat([ids, output.sequences[:, :i]], dim=1)
        expected = model(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False).logits
        assert relative_error(logits, expected[:, -1].detach()) < 1e-5


def test_an_unknown_wrapper_is_refused_with_what_it_wraps() -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pretrained_model = tiny()

    model: Any = WithHead()
    with pytest.raises(TypeError, match=r"got WithHead. Pass `model.pretrained_model`, which it wraps"):
        sink_generate(model, random_ids(3), max_new_tokens=2)
    with pytest.raises(TypeError, match=r"got WithHead. Pass `model.pretrained_model`, which it wraps"):
        sink_prefill(model, random_ids(3), SinkCache(build_config("llama")))


def test_the_generate_of_the_class_is_called() -> None:
    """A repository with `custom_generate` sets another one on the model, which may call `sink_generate`."""
    model, ids = tiny(), random_ids(10)
    expected: Any = sink_generate(model, ids, max_new_tokens=30, **NEW_STREAM)
    model.generate = functools.partial(sink_generate, model, max_new_tokens=30, **NEW_STREAM)
    assert torch.equal(model.generate(ids).sequences, expected.sequences)


def test_a_decoding_loop_may_call_sink_generate_for_its_model() -> None:
    model, ids = tiny(), random_ids(10)
    expected: Any = sink_generate(model, ids, max_new_tokens=30, **NEW_STREAM)

    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        return sink_generate(model, input_ids, cache=cache, max_new_tokens=30, **OPTIONS)

    output: Any = sink_generate(model, ids, custom_generate=loop, max_new_tokens=30, **NEW_STREAM)
    assert torch.equal(output.sequences, expected.sequences)


def test_a_model_whose_generate_calls_that_of_a_model_inside() -> None:
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config={**tower, "image_size": 8, "patch_size": 4},
        qformer_config={**tower, "vocab_size": 20, "encoder_hidden_size": 16},
        text_config={"model_type": "llama", **SIZES},
        num_query_tokens=3,
        image_token_index=96,
    )
    torch.manual_seed(0)
    model: Any = transformers.Blip2ForConditionalGeneration(config).eval()
    ids = random_ids(10).clamp(max=95)
    ids[:, :3] = 96
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = torch.randn(1, 3, 8, 8)
    cache = SinkCache(config, W, S)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**inputs, **{CACHE: cache}, **options)
    output: Any = sink_generate(model, **inputs, window_length=W, **options)
    assert torch.equal(output, expected)


def test_passes_for_other_processes_leave_the_cache_alone(monkeypatch: pytest.MonkeyPatch, process_group: None) -> None:
    """With `synced_gpus` a process whose text has ended runs the model until those of all others have."""
    model, ids = tiny(), random_ids(10)
    cache = SinkCache(model.config, W, S)
    options: dict[str, Any] = {"max_new_tokens": 20, "synced_gpus": True}
    expected: Any = sink_generate(model, ids, cache=cache, **options, **OPTIONS)
    seen, rest = cache.get_seq_length(), iter([True] * 3)
    unfinished = type(model)._has_unfinished_sequences

    def others_go_on(self: Any, *args: Any, **kwargs: Any) -> bool:
        return unfinished(self, *args, **kwargs) or next(rest, False)

    monkeypatch.setattr(type(model), "_has_unfinished_sequences", others_go_on)
    cache = SinkCache(copy.deepcopy(model.config), W, S)
    output: Any = sink_generate(model, ids, cache=cache, **options, **OPTIONS)
    assert torch.equal(output.sequences, expected.sequences)
    assert cache.get_seq_length() == seen + 1  # the first of them reads the last token
    assert next(rest, None) is None


def test_the_processes_of_a_data_parallel_model_need_not_keep_step(process_group: None, tmp_path: Path) -> None:
    """Its forward would wait for the other processes to send their buffers."""
    wrapped = nn.parallel.DistributedDataParallel(tiny())
    wrapped.forward = lambda *args, **kwargs: pytest.fail("the wrapper was called")  # type: ignore[method-assign]
    sink_generate(wrapped, random_ids(10), max_new_tokens=3, **NEW_STREAM)  # type: ignore[arg-type]
    list(sink_prefill(wrapped, random_ids(10), SinkCache(build_config("llama"), W, S)))  # type: ignore[arg-type]

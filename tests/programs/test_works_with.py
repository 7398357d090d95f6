"""What docs/works-with.md promises, with the real packages: a stream past its window is exact.

A model has one layer, in which a token's key and value depend on that token alone. So the logits of a stream equal
those of the same model without a cache on the first S and the last W - S tokens.
"""

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    QuantoConfig,
    TextIteratorStreamer,
    TorchAoConfig,
    pipeline,
)
from transformers.masking_utils import sdpa_mask

from attention_sinks import SinkCache, SinkSession, enable_attention_sinks, load, sink_generate

from ..support.models import CACHE, build_config, build_model, random_ids, relative_error
from ..support.programs import ROOT
from ..support.streams import OPTIONS, S, W
from ..support.tokenizer import byte_tokenizer, chat_model
from ..support.versions import RECORDS_PAST

# Packages that are older than the version of transformers call what it renamed since.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

PAGE = ROOT / "docs" / "works-with.md"
WINDOW: dict[str, Any] = {"window_length": W, "num_sink_tokens": S}
PROMPT = random_ids(20, seed=1)


def one_layer(**changes: Any) -> Any:
    return build_model(build_config("llama", num_hidden_layers=1, **changes))


def by_sink_generate(model: Any) -> Any:
    return sink_generate(model, PROMPT, max_new_tokens=30, **WINDOW, **OPTIONS)


def by_generate(model: Any) -> Any:
    return model.generate(input_ids=PROMPT, max_new_tokens=30, **OPTIONS)


@torch.no_grad()
def assert_exact(model: Any, output: Any, tolerance: float = 1e-4) -> None:
    """Check the logits of a call with 20 tokens of prompt and 30 new ones."""
    assert isinstance(output[CACHE], SinkCache)
    assert output[CACHE].kept_length == W
    stream = output.sequences
    assert stream.shape == (1, 50)
    for step in (1, 15, 29):
        seen = 20 + step
        kept = torch.cat([stream[:, :S], stream[:, seen - (W - S) : seen]], dim=1)
        expected = model(input_ids=kept, use_cache=False).logits[:, -1]
        assert relative_error(output.logits[step], expected) < tolerance


# --- adapters and quantised weights


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_peft_lora(wrapped_first: bool) -> None:
    peft = pytest.importorskip("peft")
    base = one_layer()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if wrapped_first:
            model = peft.get_peft_model(base, config).eval()
            enabled = enable_attention_sinks(model, **WINDOW)
        else:
            enabled = enable_attention_sinks(base, **WINDOW)
            model = peft.get_peft_model(base, config).eval()
    with enabled:
        output = by_generate(model)
        with model.disable_adapter():
            without = by_generate(model)
            assert_exact(model, without)
    assert_exact(model, output)
    assert relative_error(output.logits[0], without.logits[0]) > 1e-2
    cache = SinkCache(model.config, W, S)
    own = model.generate(input_ids=PROMPT, past_key_values=cache, max_new_tokens=30, **OPTIONS)
    assert torch.equal(own.sequences, output.sequences)
    assert torch.equal(by_sink_generate(model).sequences, output.sequences)
    merged = model.merge_and_unload()
    assert relative_error(by_sink_generate(merged).logits[29], output.logits[29]) < 1e-4


def quantised(folder: Path, config: Any) -> Any:
    one_layer(hidden_size=128, intermediate_size=128).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()


def test_torchao_int8(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = quantised(tmp_path, TorchAoConfig(quantization.Int8WeightOnlyConfig()))
    assert type(model.model.layers[0].mlp.up_proj.weight) is not nn.Parameter
    assert_exact(model, by_sink_generate(model))


def test_quanto_int8(tmp_path: Path) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = quantised(tmp_path, QuantoConfig(weights="int8"))
    assert isinstance(model.model.layers[0].mlp.up_proj, quanto.QLinear)
    assert_exact(model, by_sink_generate(model))


@pytest.mark.slow
def test_gguf() -> None:
    """Below the window the tokens are those of any cache; `tests/programs/test_real_model.py` goes on from there."""
    loaded: Any = load.load_model()
    model, tokenizer = loaded
    inputs = tokenizer("The meaning of life is", return_tensors="pt")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10}
    output: Any = sink_generate(model, **inputs, window_length=64, **options)
    assert torch.equal(output, model.generate(**inputs, **options))


# --- devices


@pytest.mark.filterwarnings(
    "ignore:You are calling .generate:UserWarning"
)  # early transformers 5, of any offloaded model
def test_accelerate_offload(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = by_sink_generate(one_layer())
    for model in (
        accelerate.cpu_offload(one_layer(), execution_device="cpu"),
        accelerate.disk_offload(one_layer(), tmp_path, execution_device="cpu"),
    ):
        output = by_sink_generate(model)
        assert torch.equal(torch.stack(output.logits), torch.stack(expected.logits))
        assert_exact(model, output)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_and_fsdp() -> None:
    model = one_layer()
    expected = by_sink_generate(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert_exact(wrapped.module, by_sink_generate(wrapped.module))
    sharded = one_layer()
    enabled = enable_attention_sinks(sharded, **WINDOW)
    torch.distributed.fsdp.fully_shard(sharded)
    for output in (by_sink_generate(sharded), by_sink_generate(wrapped.module)):
        assert torch.equal(torch.stack(output.logits), torch.stack(expected.logits))
    with enabled:
        assert_exact(sharded, by_generate(sharded))
    assert "generate" not in {**vars(type(sharded)), **vars(type(model))}


# --- programs around `generate`


def test_pipeline() -> None:
    model, tokenizer = chat_model(eos_token_id=None), byte_tokenizer()
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    inputs = tokenizer("The meaning of life is", return_tensors="pt")
    expected = tokenizer.decode(sink_generate(model, **inputs, **WINDOW, **options)[0], skip_special_tokens=True)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    with enable_attention_sinks(model, **WINDOW):
        assert pipe("The meaning of life is", **options)[0]["generated_text"] == expected
        made_inside = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        assert made_inside("The meaning of life is", **options)[0]["generated_text"] == expected
    cache = SinkCache(model.config, W, S)
    assert pipe("The meaning of life is", **{CACHE: cache}, **options)[0]["generated_text"] == expected
    assert cache.kept_length == W


def test_trl_unwrapped_model() -> None:
    """While the model is trained with gradient checkpointing, which keeps no cache."""
    utils = pytest.importorskip("trl.models.utils")
    accelerate = pytest.importorskip("accelerate")
    model = one_layer()
    expected = by_sink_generate(model)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model.train())
    prepared.gradient_checkpointing_enable()
    with utils.unwrap_model_for_generation(prepared, accelerator) as unwrapped:
        assert torch.equal(by_sink_generate(unwrapped).sequences, expected.sequences)
        with enable_attention_sinks(prepared, **WINDOW):
            assert torch.equal(by_generate(unwrapped).sequences, expected.sequences)
    assert prepared.training
    assert prepared.is_gradient_checkpointing


def test_textiteratorstreamer() -> None:
    model, tokenizer = chat_model(eos_token_id=None), byte_tokenizer()
    inputs = tokenizer("The meaning of life is", return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    expected = sink_generate(model, **inputs, **WINDOW, **options)[0, inputs["input_ids"].shape[1] :]
    with enable_attention_sinks(model, **WINDOW):
        for function, window in ((sink_generate, WINDOW), (type(model).generate, {})):
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
            arguments = {**inputs, "streamer": streamer, **window, **options}
            thread = threading.Thread(target=function, args=(model,), kwargs=arguments)
            thread.start()
            text = "".join(streamer)
            thread.join()
            assert text == tokenizer.decode(expected, skip_special_tokens=True)


def test_fastapi() -> None:
    """A session for each user, forked from a first one."""
    fastapi, responses = pytest.importorskip("fastapi"), pytest.importorskip("fastapi.responses")
    testclient = pytest.importorskip("fastapi.testclient")
    model, tokenizer = chat_model(), byte_tokenizer()
    first = SinkSession(model, tokenizer, window_length=64, system="Be brief.", keep_system_prompt=False)
    sessions: dict[str, SinkSession] = {}
    app: Any = fastapi.FastAPI()

    def chat(user: str, message: str) -> Any:
        session = sessions.setdefault(user, first.fork())
        return responses.StreamingResponse(session.chat(message, max_new_tokens=40), media_type="text/plain")

    app.post("/chat/{user}")(chat)
    client = testclient.TestClient(app)
    answers: dict[str, list[str]] = {"a": [], "b": []}
    for message in ("Hello", "And then?"):
        for user, texts in answers.items():
            texts.append(client.post(f"/chat/{user}", params={"message": message + user}).text)
    for user, texts in answers.items():
        alone = SinkSession(model, tokenizer, window_length=64, system="Be brief.", keep_system_prompt=False)
        assert texts == ["".join(alone.chat(message + user, max_new_tokens=40)) for message in ("Hello", "And then?")]


# --- attention


def test_attentioninterface() -> None:
    calls = []

    def counted(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(key.shape[2])
        return AttentionInterface()["sdpa"](module, query, key, value, *args, **kwargs)

    AttentionInterface.register("counted", counted)
    AttentionMaskInterface.register("counted", sdpa_mask)
    model = one_layer()
    model.set_attn_implementation("counted")
    output = by_sink_generate(model)
    assert max(calls[1:]) == W
    assert_exact(model, output)


@pytest.mark.skipif(not RECORDS_PAST, reason="early transformers 5 has another interface")
def test_paged_attention_is_for_continuous_batching() -> None:
    """Its attention makes no causal mask for a call of `generate`, whatever the cache."""
    model = one_layer()
    expected = model.generate(PROMPT, **OPTIONS, max_new_tokens=10).sequences[0, 20:].tolist()
    cache = SinkCache(model.config, W, S)
    small = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    options: dict[str, Any] = {"past_key_values": cache, "continuous_batching_config": small, "max_new_tokens": 10}
    with enable_attention_sinks(model, **WINDOW):
        outputs = model.generate_batch([PROMPT[0].tolist()], **options)
        assert [each.generated_tokens for each in outputs.values()] == [expected]
        tokens = model.generate(PROMPT, cache_implementation="paged", **options)
        assert tokens.flatten()[20:].tolist() == expected
    assert cache.get_seq_length() == 0
    model.set_attn_implementation("paged|eager")
    with enable_attention_sinks(model, **WINDOW):
        for call in (by_sink_generate, by_generate):
            with pytest.raises(ValueError, match="set_attn_implementation"):
                call(model)


# --- the page


def test_every_line_of_the_page_has_its_test() -> None:
    tests = Path(__file__).read_text().lower()
    table = PAGE.read_text().split("##")[0]
    lines = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    names = [re.findall(r"\w+", line.replace("optimum-", ""))[0].lower() for line in lines]
    assert len(names) == 13
    untested = [line for line, name in zip(lines, names, strict=True) if f"def test_{name}" not in tests]
    assert [line.split("]")[0] for line in untested] == ["[bitsandbytes"]

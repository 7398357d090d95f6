"""lm-evaluation-harness through a `SinkCache`: answers and log-likelihoods are those of the library."""

import json
import math
import pydoc_data.topics
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="an optional dependency: pip install attention-sinks[lm-eval]")

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from attention_sinks import SinkCache, sink_generate
from attention_sinks.evaluate import curves
from attention_sinks.lm_eval import SinkLM
from attention_sinks.load import load_model

from ..support.models import CACHE
from ..support.programs import ENVIRONMENT
from ..support.tokenizer import byte_tokenizer, chat_model

WINDOW = 24
PROMPTS = ["The quick brown fox jumps over the lazy dog. " * number + "The quick" for number in (1, 3, 6)]
CHOICES = ["brown fox", "lazy"]


@pytest.fixture(autouse=True)
def _nothing_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what the harness collects of the machine for its reports, which takes seconds."""
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model()


def task(name: str, folder: Path, documents: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """Return a task of the harness whose documents are in a local file."""
    path = folder / f"{name}.json"
    path.write_text("\n".join(map(json.dumps, documents)))
    data = {"data_files": str(path), "cache_dir": str(folder / "cache")}
    return {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "train", **settings}


def writing(folder: Path) -> dict[str, Any]:
    documents = [{"text": prompt, "answer": ""} for prompt in PROMPTS]
    return task(
        "writing", folder, documents, output_type="generate_until", doc_to_text="{{text}}", doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip


def reading(folder: Path, text: str) -> dict[str, Any]:
    return task(
        "reading", folder, [{"text": text}], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", metric_list=[{"metric": "word_perplexity"}],
    )  # fmt: skip


def choosing(folder: Path) -> dict[str, Any]:
    documents = [{"question": prompt, "choices": CHOICES, "answer": 0} for prompt in PROMPTS[1:2]]
    return task(
        "choosing", folder, documents, output_type="multiple_choice", doc_to_text="{{question}}",
        doc_to_choice="{{choices}}", doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip


def responses(results: Any, name: str) -> list[Any]:
    """Return what the model answered to each document of a task."""
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


def written(model: Any, tokenizer: Any, prompt: str, **options: Any) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    output: Any = sink_generate(model, **inputs, **options, max_new_tokens=6, do_sample=False)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.split("\n\n")[0]


@torch.no_grad()
def step_by_step(model: Any, ids: list[int], num_context: int) -> tuple[float, bool]:
    """Return the log-likelihood of the tokens after the context, and if they are greedy. Tokens are fed one by one."""
    cache = SinkCache(model.config, WINDOW)
    steps = [model(torch.tensor([[token]]), **{CACHE: cache}).logits[0, -1] for token in ids[:-1]]
    logits, targets = torch.stack(steps)[num_context - 1 :], torch.tensor(ids[num_context:])
    log_likelihood = logits.log_softmax(-1).gather(-1, targets[:, None]).sum()
    return float(log_likelihood), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods_are_those_of_single_tokens_whatever_the_batch(batch_size: int) -> None:
    model, tokenizer = chat_model(), byte_tokenizer()
    pairs = [("", "abc"), ("x" * 40, " and some more text past the window"), ("ab", "c"), ("Aa", "b" * 60), ("Aa", "c")]
    instances = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    lm = SinkLM(model, tokenizer=tokenizer, batch_size=batch_size, window_length=WINDOW)
    for (context, continuation), found in zip(pairs, lm.loglikelihood(instances), strict=True):
        context_ids = tokenizer.encode(context) or [tokenizer.bos_token_id]
        expected = step_by_step(model, context_ids + tokenizer.encode(continuation), len(context_ids))
        assert found == (pytest.approx(expected[0], rel=1e-5), expected[1])


def test_what_is_not_supported_is_refused_when_the_model_is_made() -> None:
    for options, message in (
        ({"batch_size": "auto"}, "`batch_size` must be a number, got 'auto'"),
        ({"mixed_precision_dtype": "bfloat16"}, "`mixed_precision_dtype` must be left out, got 'bfloat16'"),
        ({"window_length": 4}, "`num_sink_tokens` must be smaller than `window_length`"),
    ):
        with pytest.raises(ValueError, match=message):
            SinkLM(chat_model(), tokenizer=byte_tokenizer(), **options)


@pytest.mark.slow
def test_tasks_of_every_kind_go_through_the_window(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    text = "\n".join(pydoc_data.topics.topics.values())[:450]
    lm = SinkLM(model, tokenizer=tokenizer, batch_size=2, window_length=WINDOW)
    tasks = [writing(tmp_path), reading(tmp_path, text), choosing(tmp_path)]
    results = evaluator.simple_evaluate(lm, tasks=tasks, bootstrap_iters=0)

    answers = [answer for (answer,) in responses(results, "writing")]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer == written(model, tokenizer, prompt, window_length=WINDOW, prefill_chunk_size=5)
    again = [Instance("loglikelihood", {}, pair, 0) for pair in zip(PROMPTS, answers, strict=True)]
    assert [is_greedy for _, is_greedy in lm.loglikelihood(again)] == [True] * 3

    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text)]])
    assert ids.shape[1] > 4 * WINDOW
    losses = torch.cat([scores.losses for scores in curves(model, ids, WINDOW, [4])["4 sinks"]])
    assert responses(results, "reading") == [[pytest.approx(-float(losses.sum()), rel=1e-5)]]
    perplexity = results["results"]["reading"]["word_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(float(losses.sum()) / len(re.split(r"\s+", text))), rel=1e-4)

    for prompt, found in zip(PROMPTS[1:2], responses(results, "choosing"), strict=True):
        for choice, answer in zip(CHOICES, found, strict=True):
            ids = tokenizer.encode(f"{prompt} {choice}")
            expected = step_by_step(model, ids, len(tokenizer.encode(prompt)))
            assert answer == (pytest.approx(expected[0], rel=1e-4), expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["cache", "custom_generate"])
def test_the_model_of_the_harness_takes_a_window_by_gen_kwargs(
    form: str, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    if form == "cache":
        options: Any = {CACHE: SinkCache(model.config, WINDOW)}
    else:  # as the repository on the Hub
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        (tmp_path / "custom_generate").mkdir()
        (tmp_path / "custom_generate/generate.py").write_text("from attention_sinks import sink_generate as generate\n")
        options = f"custom_generate={tmp_path},trust_remote_code=True,window_length={WINDOW}"
    lm = HFLM(model, tokenizer=tokenizer, batch_size=3)
    results = evaluator.simple_evaluate(lm, tasks=[writing(tmp_path)], gen_kwargs=options, bootstrap_iters=0)
    expected = [[written(model, tokenizer, prompt, window_length=WINDOW)] for prompt in PROMPTS]
    assert responses(results, "writing") == expected


@pytest.mark.slow
@pytest.mark.processes
def test_the_command_of_the_harness_knows_the_model(tmp_path: Path) -> None:
    chat_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "reading.yaml").write_text(json.dumps(reading(tmp_path, "The quick brown fox. " * 20)))
    command = [
        sys.executable, "-m", "attention_sinks.lm_eval", "run", "--model", "hf-sinks",
        "--model_args", f"pretrained={tmp_path}/model,window_length={WINDOW},num_sink_tokens=2",
        "--tasks", "reading", "--include_path", str(tmp_path), "--device", "cpu",
    ]  # fmt: skip
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(r"reading\s*\|.*word_perplexity", result.stdout)

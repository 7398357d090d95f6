"""`hf-sinks`: a model of lm-evaluation-harness whose log-likelihoods and answers go through a `SinkCache`.

Importing this module registers it. `python -m attention_sinks.lm_eval` is the command `lm_eval` with this model.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM, stop_sequences_criteria
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f'{error}. Install it with: pip install "attention-sinks[lm-eval]>=1"') from error

from .cache import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_LENGTH, SinkCache
from .generate import sink_generate
from .prefill import default_chunk_size, sink_prefill

# More tokens than any text has; the harness slices by this number.
UNLIMITED = 2**40


@register_model("hf-sinks")
class SinkLM(HFLM):  # type: ignore[misc]  # lm_eval has no types
    """The model `hf` of lm-evaluation-harness, with a window.

    Each token of a text sees exactly its own window: the first `num_sink_tokens` tokens and the most recent ones. Texts
    of any length are read in one piece, in constant memory.

    Args:
        pretrained: Hub id or folder of a causal language model, or the model.
        window_length: maximum number of tokens in the cache, sink tokens included.
        num_sink_tokens: number of first tokens that are never evicted.
        prefill_chunk_size: number of tokens that the model reads at once; by default as in `sink_prefill`.
        kwargs: more arguments of the model `hf`. Prompts are only truncated if `max_length` is one of them.

    Raises:
        ValueError, NotImplementedError: naming the argument, or the model type and the reason.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        window_length: int = DEFAULT_WINDOW_LENGTH,
        num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS,
        prefill_chunk_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not str(kwargs.get("batch_size", 1)).isdecimal():
            raise ValueError(f"`batch_size` must be a number, got {kwargs['batch_size']!r}.")
        if kwargs.get("mixed_precision_dtype") is not None:
            raise ValueError(
                f"`mixed_precision_dtype` must be left out, got {kwargs['mixed_precision_dtype']!r}. Choose the data "
                "type of the weights with `dtype`."
            )
        super().__init__(pretrained, **kwargs)
        self.window_length = window_length
        self.num_sink_tokens = num_sink_tokens
        self.prefill_chunk_size = prefill_chunk_size
        self._new_cache()  # refuses what is not supported

    @property
    def max_length(self) -> int:
        """The number of tokens from which on texts are truncated or split."""
        return self._max_length or UNLIMITED

    def _new_cache(self, attention_mask: Tensor | None = None) -> SinkCache:
        return SinkCache(self.model.config, self.window_length, self.num_sink_tokens, attention_mask=attention_mask)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and True if it is what greedy decoding gives.

        Args:
            requests: for each text its key in the harness, and the token ids of context and continuation.
            disable_tqdm: hide the progress bar.
            override_bs: number of texts that are read together.
        """
        results: dict[int, tuple[float, bool]] = {}
        longest_first = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        batch_size = override_bs or self.batch_size
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Log-likelihoods") as progress:
            for start in range(0, len(requests), batch_size):
                batch = longest_first[start : start + batch_size]
                for i, result in zip(batch, self._score([requests[i][1:] for i in batch]), strict=True):
                    results[i] = result
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
                progress.update(len(batch))
        return [results[i] for i in range(len(requests))]

    def _score(self, texts: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return the log-likelihoods of a batch of pairs of context and continuation."""
        length = max(len(context) + len(continuation) for context, continuation in texts)
        # Rows are padded on the right, where no token sees the pads.
        input_ids = torch.zeros(len(texts), length, dtype=torch.long)
        is_scored = torch.zeros(len(texts), length, dtype=torch.bool)
        for row, (context, continuation) in enumerate(texts):
            end = len(context) + len(continuation)
            input_ids[row, :end] = torch.tensor(context + continuation)
            is_scored[row, len(context) : end] = True
        input_ids = input_ids.to(self.device)
        is_scored = is_scored.to(self.device)
        prompt = input_ids[:, :-1]
        cache = self._new_cache(attention_mask=torch.ones_like(prompt))
        log_likelihoods = torch.zeros(len(texts), dtype=torch.float64)
        is_greedy = torch.ones(len(texts), dtype=torch.bool)
        start = 1
        for output in sink_prefill(self.model, prompt, cache, self.prefill_chunk_size):
            logits: Any = output.logits
            end = start + logits.shape[1]
            targets, counts = input_ids[:, start:end], is_scored[:, start:end]
            log_probs = logits.log_softmax(dim=-1, dtype=self.softmax_dtype or torch.float32)
            of_targets = log_probs.gather(-1, targets[..., None])[..., 0].masked_fill(~counts, 0.0)
            log_likelihoods += of_targets.sum(dim=-1).cpu()
            is_greedy &= ((logits.argmax(dim=-1) == targets) | ~counts).all(dim=-1).cpu()
            start = end
        return list(zip(log_likelihoods.tolist(), is_greedy.tolist(), strict=True))

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.LongTensor:
        if not generation_kwargs.get("do_sample"):
            generation_kwargs.pop("temperature", None)
        cache = self._new_cache()
        chunk_size = self.prefill_chunk_size
        if chunk_size is None and context.shape[1] > self.window_length:
            chunk_size = default_chunk_size(self.model, cache)
        return sink_generate(  # type: ignore[return-value]
            self.model,
            context,
            cache=cache,
            prefill_chunk_size=chunk_size,
            max_length=max_length,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0]),
            pad_token_id=self.tokenizer.pad_token_id,
            **generation_kwargs,
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

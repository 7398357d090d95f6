"""`token_indices` says which token stands in which column of keys and of attention weights.

tests/laws/test_machine.py checks it after every call of a random sequence, for padded batches and all kinds of layers.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_sinks import SinkCache, sink_prefill

from ..support.models import CACHE, build_config, build_model, random_ids, relative_error, tiny_model
from ..support.states import CONFIG, tokens_in, update
from ..support.streams import OPTIONS, S, W, padded, read

pytestmark = pytest.mark.usefixtures("no_grad")


def eager_model(scale: float = 4.0) -> Any:
    """A model that returns its attention weights. With one layer, states do not depend on other tokens."""
    config = build_config("llama", num_hidden_layers=1)
    config._attn_implementation = "eager"
    return build_model(config, scale)


def kept(ids: Tensor, seen: int) -> Tensor:
    return ids[:, :seen] if seen <= W else torch.cat([ids[:, :S], ids[:, seen - W + S : seen]], dim=1)


def test_weights_in_the_order_of_the_indices_are_those_of_the_kept_tokens() -> None:
    model, prompt_length = eager_model(), 6
    cache = SinkCache(model.config, W, S)
    output = model.generate(
        random_ids(prompt_length), **{CACHE: cache}, max_new_tokens=30, **OPTIONS, output_attentions=True
    )
    for k, (weights,) in enumerate(output.attentions):
        seen = prompt_length + k
        expected = model(kept(output.sequences, seen), output_attentions=True).attentions[0]
        order = cache.token_indices(0, weights, seen=seen)[0].argsort()
        assert relative_error(weights[..., order], expected[..., -weights.shape[2] :, :]) < 1e-5
    last = output.attentions[-1][0]
    assert torch.equal(cache.token_indices(0, last), cache.token_indices(0, last, seen=seen))
    assert torch.equal(
        output.sequences.gather(1, cache.token_indices()).sort().values, kept(output.sequences, seen).sort().values
    )


def test_the_indices_of_an_earlier_pass_are_those_of_its_time() -> None:
    model = eager_model()
    _, ids, mask = padded([5, 14, 20])
    ids = torch.cat([ids, random_ids(40, 3)], dim=1)
    for padding in (None, mask):
        cache, then = SinkCache(model.config, W, S, attention_mask=padding), []
        for chunk in ids.split([20, *[1] * 25, 5, *[1] * 10], dim=1):
            read(model, cache, chunk)
            sizes = min(cache.get_seq_length() - chunk.shape[1], W - 1) + chunk.shape[1]
            weights = torch.empty(3, 1, chunk.shape[1], sizes)
            then.append((weights, cache.get_seq_length(), cache.token_indices(0, weights)))
        for weights, seen, indices in then:
            assert torch.equal(cache.token_indices(0, weights, seen=seen), indices)


@pytest.mark.parametrize("is_padded", [False, True])
def test_chunks_of_sink_prefill_show_the_sinks_once_for_each_token(is_padded: bool) -> None:
    model = eager_model(scale=1.0)  # no weight of a visible column is rounded to zero
    _, ids, mask = padded([33, 40] if is_padded else [40, 40])
    cache = SinkCache(model.config, W, S, attention_mask=mask)
    for output in sink_prefill(model, ids, cache, 13, output_attentions=True):
        weights: Any = output.attentions[0]  # type: ignore[index]
        indices = cache.token_indices(0, weights, prefilled=True)
        assert not weights.mT[(indices < 0)[:, None].expand(-1, weights.shape[1], -1)].any() or is_padded
        for query in range(weights.shape[2]):
            seen = cache.get_seq_length() - weights.shape[2] + query + 1
            for row, pads in enumerate((mask == 0).sum(dim=1).tolist()):
                shown = indices[row][weights[row, 0, query] > 0]
                tokens = ids[row : row + 1, pads:seen]
                if seen > pads:
                    assert torch.equal(ids[row, shown].sort().values, kept(tokens, seen - pads)[0].sort().values)


@pytest.mark.usefixtures("_as_on_cuda")
def test_a_step_that_returns_all_slots_has_empty_columns() -> None:
    cache = SinkCache(CONFIG, 8, 2)
    update(cache, [0, 1, 2])
    for token in range(3, 20):
        cache.expect_compiled_steps()
        assert cache.get_mask_sizes(1, 0)[0] == 8
        values = update(cache, [token])[1]
        indices = cache.token_indices(1, torch.empty(1, 1, 1, 8))
        assert indices.tolist() == cache.token_indices(1).tolist()
        assert [i for i, j in zip(tokens_in(values), indices[0].tolist(), strict=True) if j >= 0] == [
            j for j in indices[0].tolist() if j >= 0
        ]
        assert int((indices < 0).sum()) == max(7 - token, 0)


def test_a_cache_without_tokens_has_no_columns_with_tokens() -> None:
    assert (SinkCache(CONFIG, 8, 2).token_indices() == -1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer_idx": 2}, "`layer_idx` must be that of a layer with keys of the text, got 2"),
        ({"layer_idx": -1}, "`layer_idx` must be that of a layer"),
        (
            {"attentions": torch.empty(1, 4, 1, W - 1)},
            "`attentions` must have the 16 columns .* 20 tokens were seen, got 15",
        ),
        ({"attentions": torch.empty(1, 4, 5, 20), "seen": 4}, "`attentions` must have"),
        ({"attentions": torch.empty(1, 4, 3, 18), "prefilled": True}, "`attentions` must have the 26 columns"),
    ],
)
def test_columns_that_cannot_be_are_refused(arguments: Any, message: str) -> None:
    model = tiny_model("llama")
    cache = SinkCache(model.config, W, S)
    read(model, cache, random_ids(20))
    with pytest.raises(ValueError, match=message):
        cache.token_indices(**arguments)

"""A detokenizer returns text piece by piece, while tokens arrive."""

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from ..support.inside import Detokenizer, pending_length
from ..support.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def test_pieces_keep_the_spaces_that_a_tokenizer_hides() -> None:
    words = ["<s>", "\u2581Hello", "\u2581world", "\u2581time"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(["<s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.push, ([1], [2], [0], [3]))) == "Hello world time"
    assert Detokenizer(tokenizer, [1]).push([2]) == " world"


@given(st.text(), st.lists(st.integers(1, 4), min_size=1))
def test_pieces_add_up_to_the_text(text: str, steps: list[int]) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    detokenizer, pieces = Detokenizer(TOKENIZER), []
    position = 0
    while position < len(ids):
        step = steps[position % len(steps)]
        pieces.append(detokenizer.push(ids[position : position + step]))
        assert pending_length(detokenizer) < 32
        position += step
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True)

"""A tokenizer with a token for each byte, chat templates of three families, and a tiny model for them."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from .models import build_config, build_model

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (  # like Llama 3: begins with a token of its own and trims contents
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
BRACKETS = (  # like Llama 2: puts the system prompt into the first message
    "{% for m in messages %}{% if m.role == 'system' %}{% elif m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if messages[0].role == 'system' and loop.index0 == 1 %}<<{{ messages[0].content }}>> {% endif %}"
    "{{ m.content }} [/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "brackets": BRACKETS}
END = 2
# As many words as the streams of `attention-sinks recall` are made of.
WORDS = ["".join(letters) for letters in product("abcde", repeat=5)][:800]


def byte_tokenizer(template: str | None = CHATML, words: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """A token for each byte, so that text and tokens have the same length, and three special tokens.

    The tokens of `words`, each with a space before it, are in the vocabulary, but no text is encoded with them.
    """
    special = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*special, *alphabet, *(f"\u0120{word}" for word in words)]  # the byte-level form of a space
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[2])
    made.chat_template = template
    return made


def chat_model(architecture: str = "llama", **changes: Any) -> Any:
    """A random model with the vocabulary of `byte_tokenizer`; with `eos_token_id=None` its answers never end."""
    return build_model(build_config(architecture, **{"vocab_size": 259, "eos_token_id": END, **changes}))


class Answer(LogitsProcessor):
    """Makes a model write a text and then end its answer."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokens = [*tokenizer(text, add_special_tokens=False)["input_ids"], END]
        self.said = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self.tokens[self.said]] = 0
        self.said += 1
        return chosen

"""Generate several answers to one long prompt. The prompt is read once; each answer uses a fork of the cache."""

import pydoc_data.topics

import torch

from attention_sinks import SinkCache, sink_generate, sink_prefill
from attention_sinks.load import load_model

model, tokenizer = load_model()
text = pydoc_data.topics.topics["strings"][:3_000] + "\n\nIn short, strings in Python"
prompt = tokenizer(text, return_tensors="pt")["input_ids"]

cache = SinkCache(model.config, window_length=256)
for _ in sink_prefill(model, prompt[:, :-1], cache):  # `sink_generate` reads the last token
    pass
print(f"{cache.get_seq_length()} tokens read, {cache.kept_length} kept")

torch.manual_seed(0)
for number in range(3):
    output = sink_generate(model, prompt, cache=cache.fork(), do_sample=True, temperature=0.8, max_new_tokens=24)
    print(f"{number + 1}. strings in Python{tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)}")

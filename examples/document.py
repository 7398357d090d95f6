"""Read a document that is many times longer than the window, then ask a question about its end."""

import pydoc_data.topics

from attention_sinks import SinkSession
from attention_sinks.load import load_model

model, tokenizer = load_model()
session = SinkSession(model, tokenizer, window_length=256)

document = "\n".join(pydoc_data.topics.topics.values())[:8_000]
tokens = session.feed(document)  # shows a progress bar; memory does not grow past the window
print(f"{tokens} tokens read, {session.kept_length} kept")

for piece in session.chat("In one sentence: what is the last part about?", max_new_tokens=40):
    print(piece, end="", flush=True)
print()

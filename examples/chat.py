"""Chat for several times the window length. The system prompt is never evicted."""

from attention_sinks import SinkSession
from attention_sinks.load import load_model

model, tokenizer = load_model()  # SmolLM2-135M; load others with AutoModelForCausalLM and AutoTokenizer
session = SinkSession(model, tokenizer, window_length=72, system="You are a cheerful sailor. Answer in one sentence.")

for message in (
    "Hello! Who are you?",
    "What do you see from your ship?",
    "What did you have for breakfast?",
    "Where are you sailing to?",
    "Tell me about a storm.",
    "Will you come back home?",
):
    print(f"\n> {message}")
    for piece in session.chat(message, max_new_tokens=24):
        print(piece, end="", flush=True)
    print(f"\n  [{session.tokens_seen} tokens seen, {session.kept_length} kept]")

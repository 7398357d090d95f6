"""Serve several users with one model: what all conversations begin with is read once, and each user gets a fork."""

import time

from attention_sinks import SinkSession
from attention_sinks.load import load_model

GUIDE = "The library opens at nine. Books are lent for four weeks. The café is on the second floor. " * 15
QUESTIONS = {
    "Ada": "When does the library open?",
    "Grace": "Where is the café?",
    "Linus": "For how long are books lent?",
}

model, tokenizer = load_model()
first = SinkSession(model, tokenizer, window_length=512)
start = time.perf_counter()
first.feed("A guide for visitors: " + GUIDE)
print(f"{first.tokens_seen} tokens read, {first.kept_length} kept, in {time.perf_counter() - start:.1f} s")

start = time.perf_counter()
sessions = {user: first.fork() for user in QUESTIONS}
print(f"{len(sessions)} forks in {1000 * (time.perf_counter() - start):.0f} ms")

for user, question in QUESTIONS.items():
    print(f"{user}: {question}\n ", "".join(sessions[user].chat(question, max_new_tokens=24)))

"""Continue prompts of different lengths in one left-padded batch, past the window. Each row equals a run on its own."""

from attention_sinks import sink_generate
from attention_sinks.load import load_model

model, tokenizer = load_model()
tokenizer.padding_side = "left"
prompts = ["The sea", "Once upon a time there was a lighthouse keeper who", "1, 2, 3, 4,"]
batch = tokenizer(prompts, return_tensors="pt", padding=True)

options = {"window_length": 20, "max_new_tokens": 24, "do_sample": False}
rows = tokenizer.batch_decode(sink_generate(model, **batch, **options), skip_special_tokens=True)
for prompt, row in zip(prompts, rows, strict=True):
    alone = sink_generate(model, **tokenizer(prompt, return_tensors="pt"), **options)
    same = tokenizer.decode(alone[0], skip_special_tokens=True) == row
    print(f"--- {row}\n    the same as alone: {same}")

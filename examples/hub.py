"""Call `generate` with a `custom_generate` repository. On the Hub it has an id; here it is the folder `hub`."""

from pathlib import Path

from attention_sinks import SinkCache
from attention_sinks.load import load_model

model, tokenizer = load_model()
inputs = tokenizer("The three most important things at sea are", return_tensors="pt")
cache = SinkCache(model.config, window_length=32)
output = model.generate(
    **inputs,
    cache=cache,
    custom_generate=str(Path(__file__).resolve().parents[1] / "hub"),
    trust_remote_code=True,
    max_new_tokens=60,
    do_sample=False,
)
print(tokenizer.decode(output[0], skip_special_tokens=True))
print(f"{cache.get_seq_length()} tokens seen, {cache.kept_length} kept")

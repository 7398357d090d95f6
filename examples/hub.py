"""Call `generate` with the `custom_generate` repository of `make hub`. On the Hub it has an id; here it is a folder."""

import sys

from attention_sinks.load import load_model

model, tokenizer = load_model()
inputs = tokenizer("The three most important things at sea are", return_tensors="pt")
output = model.generate(
    **inputs,
    custom_generate=sys.argv[1] if sys.argv[1:] else "build/hub",
    trust_remote_code=True,
    window_length=32,
    max_new_tokens=60,
    do_sample=False,
    return_dict_in_generate=True,
)
print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
cache = output.past_key_values
print(f"{cache.get_seq_length()} tokens seen, {cache.kept_length} kept")

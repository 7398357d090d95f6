"""The form for the Hub: `generate` with a `custom_generate` repository, here from its folder beside this one."""

from pathlib import Path

from attention_sinks.load import load_model

model, tokenizer = load_model()
inputs = tokenizer("The three most important things at sea are", return_tensors="pt")
output = model.generate(
    **inputs,
    custom_generate=str(Path(__file__).resolve().parents[1] / "hub"),
    trust_remote_code=True,
    window_length=32,
    max_new_tokens=60,
    do_sample=False,
    return_dict_in_generate=True,
)
cache = output.past_key_values
print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
print(f"{cache.get_seq_length()} tokens seen, {cache.kept_length} kept")

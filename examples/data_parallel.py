"""Continue prompts in several processes, each with a model and a cache of its own:

    torchrun --standalone --nproc-per-node 2 examples/data_parallel.py

With a GPU for each process, `accelerate launch --num_processes 2 examples/data_parallel.py` does the same.
"""

import sys

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from attention_sinks import sink_generate
from attention_sinks.load import load_model

state = PartialState(cpu=not torch.cuda.is_available())
model, tokenizer = load_model(*sys.argv[1:])  # SmolLM2-135M; for another: its name, or its folder
model.to(state.device)
tokenizer.padding_side = "left"
prompts = ["The sea", "Once upon a time there was a lighthouse keeper who", "1, 2, 3, 4,", "My dear friend,"]

with state.split_between_processes(prompts) as own:
    batch = tokenizer(own, return_tensors="pt", padding=True).to(state.device)
    output = sink_generate(model, **batch, window_length=20, max_new_tokens=24, do_sample=False)
    rows = tokenizer.batch_decode(output, skip_special_tokens=True)
for row in gather_object(rows):
    state.print(f"--- {row}")
state.destroy_process_group()

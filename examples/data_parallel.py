"""Continue prompts in several processes. Each process has its own model and cache:

    torchrun --standalone --nproc-per-node 2 examples/data_parallel.py

With one GPU per process, run `accelerate launch --num_processes 2 examples/data_parallel.py`.
"""

import sys

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from attention_sinks import sink_generate
from attention_sinks.load import load_model

state = PartialState(cpu=not torch.cuda.is_available())
model, tokenizer = load_model(*sys.argv[1:])  # SmolLM2-135M, or the Hub id or folder in the first argument
model.to(state.device)
tokenizer.padding_side = "left"
prompts = ["The sea", "Once upon a time there was a lighthouse keeper who", "1, 2, 3, 4,", "My dear friend,"]

with state.split_between_processes(prompts) as local_prompts:
    batch = tokenizer(local_prompts, return_tensors="pt", padding=True).to(state.device)
    output = sink_generate(model, **batch, window_length=20, max_new_tokens=24, do_sample=False)
    rows = tokenizer.batch_decode(output, skip_special_tokens=True)
for row in gather_object(rows):
    state.print(f"--- {row}")
state.destroy_process_group()

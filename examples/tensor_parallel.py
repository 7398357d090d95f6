"""Split a model over processes (tensor parallelism). Each process computes and caches some of the heads:

    torchrun --standalone --nproc-per-node 3 examples/tensor_parallel.py

The number of processes must divide the number of key-value heads. SmolLM2-135M has three.
"""

import os
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from attention_sinks import SinkCache, sink_generate
from attention_sinks.load import source_of

name, options = source_of(sys.argv[1] if sys.argv[1:] else None)  # Hub id or folder; default: SmolLM2-135M
tokenizer = AutoTokenizer.from_pretrained(name, **options)
model = AutoModelForCausalLM.from_pretrained(name, distributed_config=DistributedConfig(tp_plan="auto"), **options)
inputs = tokenizer("Once upon a time there was a lighthouse keeper who", return_tensors="pt").to(model.device)
cache = SinkCache(model.config, window_length=32)
output = sink_generate(model, **inputs, cache=cache, max_new_tokens=60, do_sample=False)
if os.environ.get("RANK", "0") == "0":
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    heads = f"{cache.layers[0].keys.shape[1]} of the {model.config.num_key_value_heads} heads"
    print(f"{cache.get_seq_length()} tokens seen, {cache.kept_length} kept, with {heads}")

"""Compress the cache of a long context once, and answer two questions from the files.

A notebook in plain Python: run it as a whole, or cell by cell (`# %%`) in an editor that knows them. It uses the small
model and a context of the repository, and needs neither a GPU nor the internet.
"""

# %% A model and a context, as transformers has them
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cachegen

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = REPOSITORY / "models" / "tiny-mistral"

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
text = (REPOSITORY / "9k_prompts" / "0.txt").read_text(encoding="utf-8")[:6000]
context = tokenizer(text, return_tensors="pt").input_ids

# %% Prefill it once, and compress the cache
with torch.inference_mode():
    output = model(context)
compressed = cachegen.compress(output, context, model)
original_bytes = compressed.num_values * model.dtype.itemsize
print(f"{compressed.num_tokens} tokens: {original_bytes:,} bytes as a cache, {compressed.num_bytes:,} compressed")
print(f"{compressed.bits_per_value:.2f} bits per value")

folder = tempfile.TemporaryDirectory()
compressed.save(folder.name)

# %% Any time later: answer from the files, without the context's prefill
QUESTION = "\nWhat is the value of register {0}?\nregister {0}:"

for register in ("letter-pairs", "already-together"):
    question = tokenizer(QUESTION.format(register), add_special_tokens=False, return_tensors="pt").input_ids
    prompt = torch.cat([context, question], dim=1)
    cache = cachegen.load(folder.name).to_cache(model, prompt)
    length = prompt.shape[1]
    greedy = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    from_files = model.generate(prompt, past_key_values=cache, **greedy)[0, length:]
    from_text = model.generate(prompt, **greedy)[0, length:]
    print(f"register {register}:{tokenizer.decode(from_files)} (from the text:{tokenizer.decode(from_text)})")

# %% The folder goes where you want it; here it was temporary
folder.cleanup()

"""Answer many questions about one document from one decoded cache, and see what that saves.

A notebook in plain Python: run it as a whole, or cell by cell (`# %%`) in an editor that knows them. It uses the small
model and a context of the repository, and needs neither a GPU nor the internet.
"""

# %% A model, a document, and questions about it
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cachegen

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = REPOSITORY / "models" / "tiny-mistral"
PROMPTS = REPOSITORY / "9k_prompts"

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
text = (PROMPTS / "0.txt").read_text(encoding="utf-8")[:10000]
document = tokenizer(text, return_tensors="pt").input_ids
asked = json.loads((PROMPTS / "questions.json").read_text(encoding="utf-8"))[0]["questions"]
asked = [one for one in asked if one["question"].splitlines()[-1] in text]
print(f"{document.shape[1]} tokens, {len(asked)} questions")

# %% Once per document: prefill, compress, save. The bundled model's profile makes the files small
with torch.inference_mode():
    compressed = cachegen.compress(model(document), document, model, "transform_tiny")
print(f"{compressed.num_bytes:,} bytes, {compressed.bits_per_value:.2f} bits per value")
folder = tempfile.TemporaryDirectory()
compressed.save(folder.name)

# %% The prompts: document and question
prompts = []
for one in asked:
    question = tokenizer(one["question"], add_special_tokens=False, return_tensors="pt").input_ids
    prompts.append(torch.cat([document, question], dim=1))


def answer(prompt, cache=None):
    """Return the five digits after a prompt."""
    greedy = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    output = model.generate(prompt, past_key_values=cache, **greedy)
    return tokenizer.decode(output[0, prompt.shape[1] :]).split()[0][:5]


# %% From the files: decode once, then each question goes on from the same cache
start = time.perf_counter()
cache = cachegen.load(folder.name).to_cache(model, prompts[0])
decoded_seconds = time.perf_counter() - start
from_files = []
for prompt in prompts:
    from_files.append(answer(prompt, cache))
    cache.crop(document.shape[1] - cache.get_seq_length())  # takes question and answer off again
files_seconds = time.perf_counter() - start

# %% From the text: every question prefills the document
start = time.perf_counter()
from_text = [answer(prompt) for prompt in prompts]
text_seconds = time.perf_counter() - start

# %% The same answers, sooner
right = [one["answer"] for one in asked]
for name, answers in {"files": from_files, "text": from_text}.items():
    print(f"from the {name}: {sum(a == b for a, b in zip(answers, right, strict=True))} of {len(right)} right")
print(f"from the files {files_seconds:.1f} s, {decoded_seconds:.2f} s of them to decode")
print(f"from the text {text_seconds:.1f} s")
folder.cleanup()

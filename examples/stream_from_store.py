"""Publish the cache of a document to a store, and answer on another machine while it streams in.

A notebook in plain Python: run it as a whole, or cell by cell (`# %%`) in an editor that knows them. It uses the small
model and a context of the repository, and needs neither a GPU nor the internet. The store is a folder behind a web
server of this machine; `s3://`, `gs://` and `az://` are used in the same way.
"""

# %% A model and a document
import functools
import http.server
import tempfile
import threading
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cachegen

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = REPOSITORY / "models" / "tiny-mistral"

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
text = (REPOSITORY / "9k_prompts" / "0.txt").read_text(encoding="utf-8")[:6000]
document = tokenizer(text, return_tensors="pt").input_ids

# %% Once per document: prefill, compress coarsely and finely, publish both as levels
with torch.inference_mode():
    output = model(document)
names = ("quantization_tiny_coarse", "quantization_tiny", "quantization_tiny_fine")
levels = [cachegen.compress(output, document, model, name, chunk_tokens=256) for name in names]
for number, level in enumerate(levels, 1):
    print(f"level {number}: {level.num_bytes:,} bytes, {level.bits_per_value:.2f} bits per value")
folder = tempfile.TemporaryDirectory()
cachegen.publish(folder.name, levels)


# %% Any web server can serve the folder
class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serve files and log nothing."""

    def log_message(self, *_):
        """Say nothing."""


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=folder.name))
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}"


# %% On the other machine: the prompt is all that it takes to find the document
def tell(loading):
    """Say how each chunk came."""
    for chunk in loading.chunks:
        how = "computed from the text" if chunk.source == "text" else f"level {chunk.level}, {chunk.num_bytes:,} bytes"
        print(f"  tokens {chunk.first_token} to {chunk.first_token + chunk.num_tokens}: {how}")
    print(f"  ready after {loading.ready_seconds:.2f} s, {loading.received_bytes:,} bytes received")


question = "\nWhat is the value of register already-together?\nregister already-together:"
question = tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids
prompt = torch.cat([document, question], dim=1)
greedy = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}

# First as good as it can be had within a second to the first token, then every chunk at the smallest level.
for options in ({"slo": 1.0}, {"level": 1}):
    print(f"with {options}:")
    cache = cachegen.load(url, report=tell, **options).to_cache(model, prompt)
    answer = model.generate(prompt, past_key_values=cache, **greedy)
    print(f"  register already-together:{tokenizer.decode(answer[0, prompt.shape[1] :])}")

# %% A prompt that nobody has published is computed as ever
try:
    cachegen.load(url).to_cache(model, question)
except cachegen.errors.StoreError as error:
    print(f"nothing of this prompt there: {error.is_missing}")

server.shutdown()
server.server_close()
folder.cleanup()

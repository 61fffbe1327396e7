"""Doors of serving engines: a module named after an engine is its plug-in, and needs it to be imported.

blobs           the bytes of one block of a KV cache, sealed against damage and mix-ups
layouts         tensors as engines hand them over, and back, as `KVCache`
positions       where in its context a block begins, found in its keys
block_codec     tensors to a blob and back
counters        what was coded and what was refused
metrics         the counts, as Prometheus knows them
block_store     blobs by the hashes of their tokens, in a store that engines share
paged_caches    blocks out of an engine's pages, and into them
load_policy     load or compute
request_plans   what a scheduler has loaded and saved of each request
block_transfers loading and saving, by threads beside a worker
memory_objects  LMCache's objects
lmcache         the serde `cachegen` of LMCache's multiprocess mode
vllm            the connector `CacheGenConnector` of vLLM
sglang          the storage backend `CacheGenStorage` of SGLang's HiCache
kvpress         the press `CacheGenPress` of kvpress
"""

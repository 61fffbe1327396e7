"""Doors of serving engines: each module is a plug-in of one engine, which must be installed to import it.

blobs           the bytes of one block of a KV cache, sealed against damage and mix-ups
layouts         tensors as engines hand them over, and back, as `KVCache`
positions       where in its context a block begins, found in its keys
block_codec     tensors to a blob and back
counters        what was coded and what was refused
lmcache         the serde `cachegen` of LMCache's multiprocess mode
"""

"""Get an encoded context from a store to the model in time: what to fetch, and what to compute instead."""

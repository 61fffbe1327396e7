"""Get an encoded context to the model in time: what to fetch, what to compute, and a simulator of both."""

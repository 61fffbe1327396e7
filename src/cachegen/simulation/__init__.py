"""Replay loading over bandwidth traces, without a network or a model: which policy is in time, and at what loss."""

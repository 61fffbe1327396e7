"""The policies by name, for scripts and configuration."""

from __future__ import annotations

from cachegen.streaming.policy import Policy
from cachegen.streaming.policy_front_to_back import decide_cachegen, decide_text
from cachegen.streaming.policy_two_ended import decide_two_ended

POLICIES: dict[str, Policy] = {"text": decide_text, "cachegen": decide_cachegen, "ours": decide_two_ended}
"""`text` computes everything, `cachegen` is the paper's Algorithm 1, `ours` loads from the back while computing."""

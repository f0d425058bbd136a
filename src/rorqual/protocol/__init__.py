"""Conversations to token ids and token text back to wire objects; no torch, no network.

``tokenizer`` ids and text · ``modes`` reasoning modes and model cards · ``render`` a Chat
Completions body to a prompt · ``parse`` generated text to Chat Completions objects.
"""

"""Conversations to token ids and token text back to wire objects; no torch, no network.

``tokenizer`` ids and text · ``modes`` reasoning modes and model cards · ``reasoning`` which mode
and budget a body asks for · ``dialects`` what sets the protocols apart · ``render`` a body to a
prompt · ``history`` earlier turns as they were generated · ``blame`` the field at fault · ``parse``
generated tokens to the protocols' objects · ``completions`` text without a conversation ·
``constraint`` what an answer may contain.
"""

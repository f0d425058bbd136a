"""The remaining examples of docs/clients.md: the SDKs by environment variables, and curl."""

from __future__ import annotations

import sys

from conftest import RunClient, answered, documented, exports

HELLO = [("", "A greeting.</think>Hello to you.")]


def test_sdks_find_the_server_through_the_environment(run_client: RunClient) -> None:
    outcome = run_client(
        [sys.executable, "-c", documented("SDKs", "python")], HELLO, environment=exports("SDKs")
    )
    assert outcome.stdout == "Hello to you.\n" * 3
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages"):
        assert len(answered(outcome, path)) == 1


def test_curl_lists_models_and_streams(run_client: RunClient) -> None:
    outcome = run_client(["bash", "-ec", documented("curl", "bash")], HELLO)
    assert '"deepseek-v4-flash"' in outcome.stdout.splitlines()[0]
    assert outcome.stdout.endswith("data: [DONE]\n\n")

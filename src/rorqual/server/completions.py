"""``POST /v1/completions`` and ``/beta/completions``: text to continue, or a gap to fill."""

from __future__ import annotations

from rorqual.protocol.completions import TextAnswer, render_completion
from rorqual.server.answering import text_request
from rorqual.server.endpoint import Endpoint, Job
from rorqual.server.record import RequestRecord


class CompletionEndpoint(Endpoint):
    """Answers legacy completions."""

    wire = "completions"
    id_prefix = "cmpl-"

    def prepare(self, body: bytes, answer_id: str, record: RequestRecord) -> Job:
        """See ``Endpoint.prepare``."""
        renderer = self.service.renderer
        rendered = render_completion(renderer, body)
        return Job(
            text_request(rendered, renderer.tokenizer, answer_id),
            TextAnswer(rendered, renderer.tokenizer, answer_id),
            rendered.stream,
            "non-think",
            (),
            lambda: None,
        )

"""Complete the replies of transformers' handlers: cached tokens, errors in a stream, and the end of a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from .errors import build_body, find_request_error
from .generation import STREAM_ERROR
from .turns import Job

_END = "data: [DONE]\n\n"


def add_cached_tokens(record: dict[str, Any], cached: int) -> dict[str, Any]:
    """Write the number of tokens taken from a context into the usage of a reply, and return the reply.

    Parameters
    ----------
    record : dict
        A reply, an event or a chunk; one without usage stays as it is.
    cached : int
        Tokens that were not computed again.

    Examples
    --------
    >>> add_cached_tokens({"usage": {"prompt_tokens": 9}}, 5)
    {'usage': {'prompt_tokens': 9, 'prompt_tokens_details': {'cached_tokens': 5}}}
    """
    nested = record.get("response")
    usage = (nested if isinstance(nested, dict) else record).get("usage")
    if isinstance(usage, dict):
        name = "input_tokens_details" if "input_tokens" in usage else "prompt_tokens_details"
        usage[name] = {**(usage.get(name) or {}), "cached_tokens": cached}
    return record


async def complete_stream(job: Job, chunks: AsyncIterator[Any]) -> AsyncIterator[str]:
    """Yield the events of a streamed reply, with cached tokens, errors in the form of the API, and the last line.

    Parameters
    ----------
    job : Job
        Job of the answer.
    chunks : async iterator
        Events as transformers writes them.
    """
    async for chunk in chunks:
        text = chunk if isinstance(chunk, str) else bytes(chunk).decode()
        if STREAM_ERROR in text and job.error is not None:
            yield _write_error(job, text)
        elif '"usage":{' in text:
            # JSON escapes a newline, but not the other characters at which splitlines() splits.
            yield "\n".join(_patch(line, job.cached_tokens) for line in text.split("\n"))
        else:
            yield text
    if job.kind != "responses" and job.error is None:
        yield _END


def describe_failure(error: Exception, job_id: str) -> tuple[int, dict[str, Any]]:
    """Return status and body for an error: a refusal says why, a fault of the server only its number."""
    known = find_request_error(error)
    if known is not None:
        return known.status, known.body()
    return 500, build_body(f"the server failed at request {job_id}: its log has the kind of error.", 500)


def _write_error(job: Job, text: str) -> str:
    if job.error is None:
        return text
    _, body = describe_failure(job.error, job.id)
    if job.kind == "responses":
        return text.replace(STREAM_ERROR, json.dumps(body["error"]["message"])[1:-1])
    return text.replace(f'data: {{"error": "{STREAM_ERROR}"}}', f"data: {json.dumps(body)}")


def _patch(line: str, cached: int) -> str:
    if not line.startswith("data: {") or '"usage":{' not in line:
        return line
    record = add_cached_tokens(json.loads(line.removeprefix("data: ")), cached)
    return f"data: {json.dumps(record, ensure_ascii=False, separators=(',', ':'))}"

"""Runs a job with a client that openapi-python-client has made from the OpenAPI document."""

import os
import sys

sys.path.insert(0, sys.argv[1])

from generated import AuthenticatedClient  # noqa: E402
from generated.api.jobs import get_job, list_jobs, submit_job  # noqa: E402
from generated.models import JobCreate, Problem  # noqa: E402

client = AuthenticatedClient(
    base_url=os.environ["CLAUDE_QUEUE_URL"],
    token=os.environ["CLAUDE_QUEUE_API_KEY"],
    auth_header_name="X-API-Key",
    prefix="",
    raise_on_unexpected_status=True,
)
submitted = submit_job.sync(client=client, body=JobCreate(message="Say hello."))
job = submitted.data
while job.status not in ("done", "failed", "cancelled"):
    job = get_job.sync(job.id, client=client, wait=20).data
print(job.status, job.result.content)
assert job.id in [listed.id for listed in list_jobs.sync(client=client).data]
missing = get_job.sync("job_none", client=client)
assert isinstance(missing, Problem), missing
print(missing.code)

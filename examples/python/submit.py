"""Submits a job, follows it, and prints what came of it."""

import sys

from claude_queue import ClaudeQueue, Problem

queue = ClaudeQueue()
message = " ".join(sys.argv[1:]) or "Say hello."
try:
    job = queue.submit(message)
except Problem as problem:
    sys.exit(str(problem))
print("submitted", job["id"])
for number, kind, data in queue.events(job["id"]):
    if kind == "assistant":
        print(data["content"])
    elif kind == "tool":
        print("uses", data["tool_name"])
job = queue.wait(job["id"])
if job["status"] != "done":
    sys.exit(f"{job['status']}: {job['error']}")
print(f"done for ${job['cost']}: {job['result']['content']}")

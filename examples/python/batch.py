"""Runs the prompts of a CSV file, and writes a copy with the results beside them.

    python batch.py prompts.csv results.csv

The file needs a column `prompt`. Started again after a crash, it makes no job twice: the key of a submission is made of
the prompt.
"""

import csv
import hashlib
import sys

from claude_queue import ClaudeQueue

source, target = sys.argv[1:3]
queue = ClaudeQueue()
with open(source, newline="", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
# All are submitted first, so that they run at the same time.
jobs = []
for number, row in enumerate(rows):
    once = hashlib.sha256(f"{source} {number} {row['prompt']}".encode()).hexdigest()
    jobs.append(queue.submit(row["prompt"], idempotency_key=once, metadata={"row": str(number)})["id"])
failed = 0
for row, job_id in zip(rows, jobs):
    job = queue.wait(job_id)
    failed += job["status"] != "done"
    row["status"] = job["status"]
    row["result"] = (job["result"] or {}).get("content") or job["error"]
    row["cost_usd"] = job["cost"]
with open(target, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["prompt"])
    writer.writeheader()
    writer.writerows(rows)
print(f"{len(rows)} prompts, {failed} failed")
sys.exit(1 if failed else 0)

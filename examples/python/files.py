"""Brings a file into a session, lets a job work on it, and fetches what the job wrote.

    python files.py input.txt "Count the words of input.txt into count.txt" out/
"""

import os
import sys

from claude_queue import ClaudeQueue

source, message, target = sys.argv[1:4]
queue = ClaudeQueue()
session = queue.session("files-example")["name"]
stored = queue.upload(session, source)
print("stored", stored["path"], stored["size"], "bytes")
job = queue.run(message, session=session)
if job["status"] != "done":
    sys.exit(f"{job['status']}: {job['error']}")
os.makedirs(target, exist_ok=True)
for change in job["result"]["files_changed"] or []:
    if change["status"] == "deleted" or os.path.basename(change["path"]).startswith("."):
        continue
    # The agent chose the name: only its last part is used here.
    local = os.path.join(target, os.path.basename(change["path"]))
    queue.session_download(session, change["path"], local)
    print("fetched", change["path"], change["size"], "bytes")

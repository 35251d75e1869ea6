"""A client of claude-queue in one file, for Python 3.9 or later, without other libraries. Copy it into your project.

    from claude_queue import ClaudeQueue

    queue = ClaudeQueue("http://127.0.0.1:8000", "my-key")
    job = queue.submit("Write a haiku about queues into haiku.txt")
    job = queue.wait(job["id"])
    print(job["result"]["content"])
    queue.download(job["id"], "haiku.txt", "haiku.txt")

A request that is refused raises `Problem`. What passes by itself (429 over the rate limit, 503, a lost connection) is
tried again; a submission carries an `Idempotency-Key`, so that trying again never makes a second job.
"""

import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

FINAL = ("done", "failed", "cancelled")


class Problem(Exception):
    """A request that was refused: `status`, `code` for programs, and `body`, the whole problem."""

    def __init__(self, status, body):
        self.status = status
        self.code = body.get("code")
        self.body = body
        detail = body.get("detail") or "no explanation"
        faults = "".join("\n  {field}: {message}".format(**fault) for fault in body.get("errors", []))
        super().__init__(f"{status} {self.code}: {detail}{faults}")


class ClaudeQueue:
    """A service and a key. `patience` is how many seconds a request that can't be served now is tried again."""

    def __init__(self, url=None, key=None, timeout=70, patience=120):
        self.url = (url or os.environ.get("CLAUDE_QUEUE_URL") or "http://127.0.0.1:8000").rstrip("/")
        self.key = key or os.environ.get("CLAUDE_QUEUE_API_KEY")
        self.timeout = timeout
        self.patience = patience
        # Keys are sent to this service only: no proxy, and no other address that an answer names.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())

    # Jobs

    def submit(self, message, session=None, idempotency_key=None, **settings):
        """Submits a job; the settings are those of the API, such as `model`, `max_cost_usd` or `metadata`."""
        body = {"message": message, **settings}
        if session is not None:
            body["session"] = session
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._json("POST", "/api/v1/jobs", body, headers)["data"]

    def job(self, job_id):
        """The job as it is now."""
        return self._json("GET", f"/api/v1/jobs/{job_id}")["data"]

    def wait(self, job_id, seconds=None):
        """The job once it has ended, or as it is after so many seconds."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            left = 50 if until is None else max(0, min(50, int(until - time.monotonic())))
            job = self._json("GET", f"/api/v1/jobs/{job_id}?wait={left}")["data"]
            if job["status"] in FINAL or (until is not None and time.monotonic() >= until):
                return job

    def run(self, message, **settings):
        """Submits a job and waits for its end."""
        return self.wait(self.submit(message, **settings)["id"])

    def cancel(self, job_id):
        """Cancels a job. One that has ended raises a `Problem` with the code `job-terminal`."""
        return self._json("POST", f"/api/v1/jobs/{job_id}/cancel")["data"]

    def jobs(self, **filters):
        """All jobs that fit the filters of the API, such as `status="failed"`, page by page."""
        cursor = None
        while True:
            query = urllib.parse.urlencode({**filters, **({"cursor": cursor} if cursor else {})})
            page = self._json("GET", f"/api/v1/jobs?{query}")
            yield from page["data"]
            cursor = page["pagination"]["next_cursor"]
            if cursor is None:
                return

    def events(self, job_id, after=0):
        """The events of a job as they happen, as (number, type, data), to its end. A lost connection is taken up again
        after the last event that was seen."""
        failures = 0
        while True:
            headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
            try:
                with self._open("GET", f"/api/v1/jobs/{job_id}/events", None, headers) as answer:
                    if answer.status == 204:
                        return
                    for number, kind, data in _events(answer):
                        after, failures = number, 0
                        yield number, kind, data
                        if kind in FINAL or kind == "error":
                            return
            except (OSError, urllib.error.URLError):
                failures += 1
                if failures > 10:
                    raise
            time.sleep(min(5, 0.2 * 2**failures))

    def chat(self, session, message, **settings):
        """Sends a message to a session, and gives the answer while it is written, as (type, data): `assistant`, `tool`, at
        the end `done` or `error`. A lost connection is taken up again; the run goes on meanwhile."""
        where = f"/api/v1/sessions/{urllib.parse.quote(session, safe='')}/chat/stream"
        body = json.dumps({"message": message, **settings}).encode()
        headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            "Idempotency-Key": str(uuid.uuid4()),
        }
        seen, job_id = 0, None
        try:
            with self._open("POST", where, body, headers) as answer:
                job_id = answer.headers["X-Job-Id"]
                for seen, kind, data in _events(answer):
                    yield kind, data
                    if kind in ("done", "error"):
                        return
        except (OSError, urllib.error.URLError):
            if job_id is None:
                raise
        for _, kind, data in self.events(job_id, seen):
            if kind in ("assistant", "tool"):
                yield kind, data
            elif kind in FINAL:
                yield ("done", data) if kind == "done" else ("error", {"error": data.get("error") or kind})

    # Files

    def files(self, job_id):
        """The files of the job's workspace."""
        return list(self._files(f"/api/v1/jobs/{job_id}/files"))

    def download(self, job_id, path, target):
        """Stores a file of the job's workspace."""
        self._store(f"/api/v1/jobs/{job_id}/files/{urllib.parse.quote(path)}", target)

    def archive(self, job_id, target):
        """Stores the job's workspace as `.tar.gz`."""
        self._store(f"/api/v1/jobs/{job_id}/archive", target)

    def session(self, name, **settings):
        """Makes a session, or gives the one of this name other settings."""
        return self._json("POST", "/api/v1/sessions", {"name": name, **settings})["data"]

    def upload(self, session, source, path=None):
        """Stores a file in the session's workspace: at `path`, or under its own name."""
        path = path or os.path.basename(source)
        with open(source, "rb") as file:
            content = file.read()
        boundary = uuid.uuid4().hex
        part = '--{}\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
        body = b"".join(
            [
                part.format(boundary, "path", "").encode(),
                path.encode(),
                b"\r\n",
                part.format(boundary, "file", '; filename="file"').encode(),
                content,
                f"\r\n--{boundary}--\r\n".encode(),
            ]
        )
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        where = f"/api/v1/sessions/{urllib.parse.quote(session, safe='')}/files"
        with self._open("POST", where, body, headers) as answer:
            return json.load(answer)["data"]

    def session_files(self, session):
        """The files of the session's workspace."""
        return list(self._files(f"/api/v1/sessions/{urllib.parse.quote(session, safe='')}/files"))

    def session_download(self, session, path, target):
        """Stores a file of the session's workspace."""
        where = f"/api/v1/sessions/{urllib.parse.quote(session, safe='')}/files/{urllib.parse.quote(path)}"
        self._store(where, target)

    # How it is asked

    def _files(self, where):
        page, pages = 1, 1
        while page <= pages:
            answer = self._json("GET", f"{where}?recursive=true&page={page}")
            yield from (entry for entry in answer["data"] if entry["type"] == "file")
            page, pages = page + 1, answer["pagination"]["pages"]

    def _store(self, where, target):
        # Under another name until it is whole.
        partial = f"{target}.part"
        with self._open("GET", where) as answer, open(partial, "wb") as file:
            while True:
                chunk = answer.read(64 * 1024)
                if not chunk:
                    break
                file.write(chunk)
        os.replace(partial, target)

    def _json(self, method, where, body=None, headers=None):
        headers = dict(headers or {})
        if body is not None:
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        with self._open(method, where, body, headers) as answer:
            return json.load(answer)

    def _open(self, method, where, body=None, headers=None):
        """The answer, once there is one that isn't about the moment."""
        headers = dict(headers or {})
        if self.key:
            headers["X-API-Key"] = self.key
        repeatable = method in ("GET", "DELETE") or "Idempotency-Key" in headers
        until = time.monotonic() + self.patience
        attempt = 0
        while True:
            attempt += 1
            request = urllib.request.Request(self.url + where, data=body, headers=headers, method=method)
            try:
                return self._opener.open(request, timeout=self.timeout)
            except urllib.error.HTTPError as error:
                with error:
                    problem = Problem(error.code, _body(error))
                    pause = _retry_after(error)
                hopeless = error.headers.get("x-should-retry") == "false"
                if error.code not in (429, 503) or hopeless or (error.code == 503 and not repeatable):
                    raise problem from None
            except (OSError, urllib.error.URLError):
                problem, pause = None, None
                if not repeatable:
                    raise
                if time.monotonic() >= until:
                    raise
            # A little more than what was said, so that many clients don't come back in the same moment.
            pause = (min(10, 0.25 * 2**attempt) if pause is None else pause) * random.uniform(1, 1.25)
            if problem is not None and time.monotonic() + pause > until:
                raise problem
            time.sleep(pause)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):
        return None


def _body(error):
    try:
        body = json.loads(error.read())
        return body if isinstance(body, dict) else {}
    except ValueError:
        return {}


def _retry_after(error):
    try:
        return max(0.0, float(error.headers.get("Retry-After")))
    except (TypeError, ValueError):
        return None


def _events(lines):
    """The events of a stream of lines."""
    number, kind, data = None, None, []
    for line in lines:
        line = line.decode().rstrip("\r\n")
        if not line:
            if data and number is not None:
                yield number, kind, json.loads("\n".join(data))
            number, kind, data = None, None, []
            continue
        name, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if name == "id":
            number = int(value)
        elif name == "event":
            kind = value
        elif name == "data":
            data.append(value)

"""Receives webhooks of claude-queue, verifies them and prints them.

Needs: pip install standardwebhooks
Usage: WEBHOOK_SECRET=whsec_... python3 receiver.py [PORT]
"""

import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks import Webhook, WebhookVerificationError

webhook = Webhook(os.environ["WEBHOOK_SECRET"])
seen = set()


class Receiver(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            event = webhook.verify(body, headers)
        except WebhookVerificationError as error:
            self.answer(401, f"refused: {error}")
            return
        # An event may come twice; its id tells.
        if headers["webhook-id"] not in seen:
            seen.add(headers["webhook-id"])
            about = event.get("job") or event.get("data") or {}
            print(event["type"], about.get("id"), about.get("status"), flush=True)
        self.answer(204)

    def answer(self, status, text=None):
        if text:
            print(text, file=sys.stderr, flush=True)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0), Receiver)
    print(f"listening on http://127.0.0.1:{server.server_port}/", flush=True)
    server.serve_forever()

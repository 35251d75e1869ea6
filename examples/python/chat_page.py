"""The backend of a small web page that chats with a session: the page's key stays here, and the answer is passed on while
it is written.

    python chat_page.py 8080     # then open http://127.0.0.1:8080
"""

import json
import sys
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from claude_queue import ClaudeQueue, Problem

SESSION = "chat-example"
PAGE = """<!doctype html><meta charset="utf-8"><title>Chat</title>
<form id="form"><input id="message" size="60" autofocus><button>Send</button></form><pre id="chat"></pre>
<script>
form.onsubmit = async (event) => {
  event.preventDefault();
  const said = message.value;
  message.value = "";
  chat.append("You: " + said + "\\n");
  const answer = await fetch("/chat", {method: "POST", headers: {"Content-Type": "text/plain"}, body: said});
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const {done, value} = await reader.read();
    if (done) break;
    chat.append(value);
  }
  chat.append("\\n");
};
</script>"""

queue = ClaudeQueue()
queue.session(SESSION)


class Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        page = PAGE.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def do_POST(self):
        # Only this page may make it spend money.
        origin = self.headers.get("Origin")
        if origin and urllib.parse.urlsplit(origin).netloc != self.headers.get("Host"):
            self.send_error(403)
            return
        length = min(int(self.headers.get("Content-Length", 0)), 100_000)
        message = self.rfile.read(length).decode("utf-8", "replace")
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for kind, data in queue.chat(SESSION, message):
                if kind == "assistant" and data["content"]:
                    self.send("Claude: " + data["content"] + "\n")
                elif kind == "tool":
                    self.send("[uses " + data["tool_name"] + "]\n")
                elif kind == "error":
                    self.send("It failed: " + data["error"] + "\n")
        except Problem as problem:
            self.send(f"{problem}\n")
        self.wfile.write(b"0\r\n\r\n")

    def send(self, text):
        chunk = text.encode()
        self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")

    def log_message(self, *arguments):
        pass


server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8080), Page)
print(f"http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()

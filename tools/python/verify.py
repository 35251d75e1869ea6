"""Verifies webhooks with libraries of others: one JSON object {secret, headers, body} a line, `ok` for each."""

import json
import sys

from openai import OpenAI
from standardwebhooks import Webhook

for line in sys.stdin:
    one = json.loads(line)
    Webhook(one["secret"]).verify(one["body"], one["headers"])
    client = OpenAI(api_key="none", webhook_secret=one["secret"])
    client.webhooks.verify_signature(one["body"], one["headers"])
    # What they take because it is signed, they refuse when it is changed.
    try:
        Webhook(one["secret"]).verify(one["body"] + " ", one["headers"])
    except Exception:
        print("ok", flush=True)
    else:
        sys.exit("a changed body was accepted")

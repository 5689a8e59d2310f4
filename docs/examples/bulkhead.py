"""Bulkhead from Python, with the standard library alone: store a document, ask, and read an answer as it is written.

    BULKHEAD_URL=http://127.0.0.1:9000 BULKHEAD_KEY=ten_… python3 bulkhead.py handbook.md
"""

import json
import os
import pathlib
import sys
import time
import urllib.error
import urllib.request
import uuid

URL = os.environ["BULKHEAD_URL"].rstrip("/")
KEY = os.environ["BULKHEAD_KEY"]
ATTEMPTS = 10
KINDS = {".md": "text/markdown", ".html": "text/html", ".txt": "text/plain"}


def post(path, body, user="ann"):
    """Sends JSON and returns the response. Comes again when a limit says when (429), and when the service is
    unavailable (503). The key makes that safe: what was done already is answered, and not done or paid for twice."""
    headers = {
        "Authorization": f"Bearer {KEY}",
        "Content-Type": "application/json",
        "Idempotency-Key": str(uuid.uuid4()),
        "X-User-Id": user,
    }
    request = urllib.request.Request(f"{URL}{path}", json.dumps(body).encode(), headers, method="POST")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return urllib.request.urlopen(request, timeout=120)
        except urllib.error.HTTPError as refused:
            error = json.load(refused)["error"]
            if refused.code not in (429, 503) or attempt == ATTEMPTS:
                raise SystemExit(f"{refused.code} {error['code']}: {error['message']}") from None
            wait_s = float(refused.headers.get("retry-after", 2**attempt))
            print(f"{refused.code} {error['code']}: again in {wait_s:g} s", file=sys.stderr)
            time.sleep(wait_s)


def store(path):
    """Stores a file, or a new version of it. The same file again changes nothing."""
    path = pathlib.Path(path)
    document = {
        "id": path.stem,
        "title": path.stem,
        "content": path.read_text(encoding="utf-8"),
        "content_type": KINDS[path.suffix],
    }
    with post("/v1/documents", document) as response:
        return json.load(response)["documents"][0]


def ask(message, conversation_id=None):
    """Asks, and returns the answer with its citations."""
    with post("/v1/chat", {"message": message, "conversation_id": conversation_id}) as response:
        return json.load(response)


def stream(message):
    """Asks, and yields the names and data of events as they come: `meta`, `delta`…, `done`."""
    with post("/v1/chat", {"message": message, "stream": True}) as response:
        name = None
        for line in response:
            field, _, value = line.decode().rstrip("\r\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                yield name, json.loads(value)


def main():
    document = store(sys.argv[1])
    print(f"stored {document['id']} version {document['version']}: {document['status']}")

    answer = ask("How many days of annual leave are there?")
    print(f"answer: {answer['response']}")
    print(f"cited: {', '.join(citation['document_id'] for citation in answer['citations'])}")

    print("stream: ", end="")
    for name, data in stream("How many days may be carried over?"):
        if name == "delta":
            print(data["text"], end="", flush=True)
        elif name == "done":
            print(f"\ncost: {data['usage']['cost_nano_usd']} nano-dollars")
        elif name == "error":
            raise SystemExit(f"{data['error']['code']}: {data['error']['message']}")


if __name__ == "__main__":
    main()

"""Bulkhead from Python, with the standard library alone: upload a file, ask, and read an answer as it is written.

    BULKHEAD_URL=http://127.0.0.1:9000 BULKHEAD_KEY=ten_… python3 bulkhead.py handbook.md
"""

import json
import os
import pathlib
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

URL = os.environ["BULKHEAD_URL"].rstrip("/")
KEY = os.environ["BULKHEAD_KEY"]
ATTEMPTS = 10
# A budget of a day or a month says when it has room again, too. Nobody waits for that.
LONGEST_WAIT_S = 60
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
KINDS = {".md": "text/markdown", ".html": "text/html", ".csv": "text/csv", ".pdf": "application/pdf", ".docx": DOCX}


def send(method, path, body=None, user="ann"):
    """Sends JSON and returns the response. Comes again when a limit says when (429), and when the service is
    unavailable (503). The key makes that safe: what was done already is answered, and not done or paid for twice."""
    headers = {"Authorization": f"Bearer {KEY}", "X-User-Id": user}
    if method == "POST":
        headers |= {"Content-Type": "application/json", "Idempotency-Key": str(uuid.uuid4())}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{URL}{path}", data, headers, method=method)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return urllib.request.urlopen(request, timeout=120)
        except urllib.error.HTTPError as refused:
            error = json.load(refused)["error"]
            wait_s = float(refused.headers.get("retry-after", 2**attempt))
            again = refused.code in (429, 503) and refused.headers.get("x-should-retry") != "false"
            if not again or attempt == ATTEMPTS or wait_s > LONGEST_WAIT_S:
                raise SystemExit(f"{refused.code} {error['code']}: {error['message']}") from None
            print(f"{refused.code} {error['code']}: again in {wait_s:g} s", file=sys.stderr)
            time.sleep(wait_s)


def store(path):
    """Uploads a file as a document, or as a new version of it, and waits until it is found."""
    path = pathlib.Path(path)
    content = path.read_bytes()
    upload = {
        "id": path.stem,
        "title": path.stem,
        "content_type": KINDS.get(path.suffix, "text/plain"),
        "size_bytes": len(content),
    }
    with send("POST", "/v1/uploads", upload) as response:
        begun = json.load(response)
    # Past the API, to the address that is signed for this one file; with its headers, and no key.
    urllib.request.urlopen(urllib.request.Request(begun["url"], content, begun["headers"], method="PUT")).close()
    while True:
        with send("GET", f"/v1/documents/{urllib.parse.quote(begun['document_id'])}") as response:
            document = json.load(response)
        if document["status"] == "failed":
            raise SystemExit(f"{path} cannot be read: {document['reason']}")
        if document["status"] == "ready":
            return document
        time.sleep(1)


def ask(message, conversation_id=None):
    """Asks, and returns the answer with its citations."""
    with send("POST", "/v1/chat", {"message": message, "conversation_id": conversation_id}) as response:
        return json.load(response)


def stream(message):
    """Asks, and yields the names and data of events as they come: `meta`, `delta`…, `done`."""
    with send("POST", "/v1/chat", {"message": message, "stream": True}) as response:
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

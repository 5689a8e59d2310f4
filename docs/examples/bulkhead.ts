// Bulkhead from TypeScript, with what Node 18 has: upload a file, ask, and read an answer as it is
// written. Keep the key on a server: whoever has it can ask as anybody.
//
//     BULKHEAD_URL=http://127.0.0.1:9000 BULKHEAD_KEY=ten_… node bulkhead.js handbook.md

import { randomUUID } from "node:crypto";
import { readFile } from "node:fs/promises";
import { extname, parse } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

const ATTEMPTS = 10;
// A budget of a day or a month says when it has room again, too. Nobody waits for that.
const LONGEST_WAIT_S = 60;
const KINDS: Record<string, string> = {
  ".md": "text/markdown",
  ".html": "text/html",
  ".csv": "text/csv",
  ".pdf": "application/pdf",
  ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
};

interface Problem { error: { code: string; message: string; limit?: string; retry_after_ms?: number } }
interface Begun { document_id: string; url: string; headers: Record<string, string>; expires_at: string }
interface Document { id: string; version: number; status: "pending" | "processing" | "ready" | "failed"; reason?: string }
interface Answer {
  conversation_id: string;
  response: string;
  citations: { chunk_id: string; document_id: string; title: string; source: string }[];
  usage: { cost_nano_usd: number };
}
type Event =
  | { name: "meta"; data: { id: string; conversation_id: string; model: string } }
  | { name: "delta"; data: { text: string } }
  | { name: "done"; data: Answer }
  | { name: "error"; data: Problem };

function setting(name: string): string {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set`);
  return value;
}

/**
 * Sends JSON and returns the response. Comes again when a limit says when (429), and when the service is unavailable
 * (503). The key makes that safe: what was done already is answered, and not done or paid for twice.
 */
async function send(method: "GET" | "POST", path: string, body?: object, user = "ann"): Promise<Response> {
  const posted = { "content-type": "application/json", "idempotency-key": randomUUID() };
  const request = {
    method,
    headers: {
      "authorization": `Bearer ${setting("BULKHEAD_KEY")}`,
      "x-user-id": user,
      ...(method === "POST" ? posted : {}),
    },
    body: body && JSON.stringify(body),
  };
  for (let attempt = 1; ; attempt++) {
    const response = await fetch(`${setting("BULKHEAD_URL")}${path}`, request);
    if (response.ok) return response;
    const { error } = (await response.json()) as Problem;
    const wait_s = Number(response.headers.get("retry-after") ?? 2 ** attempt);
    const again = [429, 503].includes(response.status) && response.headers.get("x-should-retry") !== "false";
    if (!again || attempt === ATTEMPTS || wait_s > LONGEST_WAIT_S) {
      throw new Error(`${response.status} ${error.code}: ${error.message}`);
    }
    console.error(`${response.status} ${error.code}: again in ${wait_s} s`);
    await sleep(wait_s * 1000);
  }
}

/** Uploads a file as a document, or as a new version of it, and waits until it is found. */
async function store(path: string): Promise<Document> {
  const id = parse(path).name;
  const content = await readFile(path);
  const upload = { id, title: id, content_type: KINDS[extname(path)] ?? "text/plain", size_bytes: content.length };
  const begun = (await (await send("POST", "/v1/uploads", upload)).json()) as Begun;
  // Past the API, to the address that is signed for this one file; with its headers, and no key.
  const put = await fetch(begun.url, { method: "PUT", headers: begun.headers, body: content });
  if (!put.ok) throw new Error(`${put.status}: ${await put.text()}`);
  for (;;) {
    const response = await send("GET", `/v1/documents/${encodeURIComponent(begun.document_id)}`);
    const document = (await response.json()) as Document;
    if (document.status === "failed") throw new Error(`${path} cannot be read: ${document.reason}`);
    if (document.status === "ready") return document;
    await sleep(1000);
  }
}

/** Asks, and returns the answer with its citations. */
async function ask(message: string, conversation_id?: string): Promise<Answer> {
  return (await send("POST", "/v1/chat", { message, conversation_id })).json() as Promise<Answer>;
}

/** Asks, and yields events as they come: `meta`, `delta`…, `done`. */
async function* stream(message: string): AsyncGenerator<Event> {
  const response = await send("POST", "/v1/chat", { message, stream: true });
  const decoder = new TextDecoder();
  let buffer = "";
  for await (const chunk of response.body!) {
    buffer += decoder.decode(chunk, { stream: true });
    const frames = buffer.split("\n\n");
    buffer = frames.pop()!;
    for (const frame of frames) {
      const field = (name: string) =>
        frame.split("\n").filter((line) => line.startsWith(`${name}: `)).map((line) => line.slice(name.length + 2)).join("");
      yield { name: field("event"), data: JSON.parse(field("data")) } as Event;
    }
  }
}

const document = await store(process.argv[2]);
console.log(`stored ${document.id} version ${document.version}: ${document.status}`);

const answer = await ask("How many days of annual leave are there?");
console.log(`answer: ${answer.response}`);
console.log(`cited: ${answer.citations.map((citation) => citation.document_id).join(", ")}`);

process.stdout.write("stream: ");
for await (const event of stream("How many days may be carried over?")) {
  if (event.name === "delta") process.stdout.write(event.data.text);
  if (event.name === "done") console.log(`\ncost: ${event.data.usage.cost_nano_usd} nano-dollars`);
  if (event.name === "error") throw new Error(`${event.data.error.code}: ${event.data.error.message}`);
}

// OpenAI's client for Node, unmodified, against a running stack: what it reads is what it expects.

import assert from 'node:assert/strict';
import OpenAI from 'openai';

const { URL, KEY, LIMITED_KEY, MODEL_URL } = process.env;
const MODEL = 'claude-haiku-4-5-20251001';
const QUESTION = [{ role: 'user', content: 'How many days of paid annual leave does an employee have?' }];

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: KEY });
const limited = new OpenAI({ baseURL: `${URL}/v1`, apiKey: LIMITED_KEY });

const fault = (what) =>
  fetch(`${MODEL_URL}/_faults`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(what),
  });

const ask = (more = {}, options = {}, of = client) =>
  of.chat.completions.create({ model: MODEL, messages: QUESTION, ...more }, options);

async function fails(kind, call) {
  try {
    await call();
  } catch (error) {
    assert.ok(error instanceof kind, `${error}`);
    return error;
  }
  assert.fail(`no ${kind.name}`);
}

async function all(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

const joined = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta.content ?? '').join('');

async function checkModels() {
  const models = [];
  for await (const model of client.models.list()) models.push(model);
  assert.ok(models.some((model) => model.id === MODEL && model.object === 'model' && model.created > 0));
}

async function checkAnswer() {
  const answer = await ask();
  assert.equal(answer.object, 'chat.completion');
  assert.ok(answer._request_id);
  const [choice] = answer.choices;
  assert.match(choice.message.content, /25 days/);
  assert.equal(choice.finish_reason, 'stop');
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  assert.equal(choice.message.annotations[0].url_citation.title, 'Staff handbook');
  assert.equal(answer.citations[0].document_id, 'handbook');
  return choice.message;
}

async function checkHistory(answered) {
  const more = { role: 'user', content: 'How many may be carried over?' };
  const messages = [{ role: 'developer', content: 'Speak plainly.' }, ...QUESTION, answered, more];
  assert.match((await ask({ messages })).choices[0].message.content, /March/);
}

async function checkStream(answered) {
  const chunks = await all(await ask({ stream: true, stream_options: { include_usage: true } }));
  assert.equal(joined(chunks), answered.content);
  const [last, used] = chunks.slice(-2);
  assert.equal(last.choices[0].finish_reason, 'stop');
  assert.equal(last.citations[0].document_id, 'handbook');
  assert.deepEqual(used.choices, []);
  assert.ok(used.usage.total_tokens > 50);
  const helper = client.chat.completions.stream({ model: MODEL, messages: QUESTION });
  assert.equal(await helper.finalContent(), answered.content);
}

async function checkErrors() {
  const wrong = new OpenAI({ baseURL: `${URL}/v1`, apiKey: KEY.slice(0, -1) });
  const unknown = await fails(OpenAI.AuthenticationError, () => ask({}, {}, wrong));
  assert.deepEqual([unknown.code, unknown.type], ['invalid_key', 'authentication_error']);
  const tool = { type: 'function', function: { name: 'f' } };
  for (const [param, value] of [['tools', [tool]], ['stop', ['x']], ['n', 2]]) {
    const error = await fails(OpenAI.BadRequestError, () => ask({ [param]: value }));
    assert.deepEqual([error.code, error.param], ['invalid_request', param]);
    assert.ok(error.requestID);
  }
  await fails(OpenAI.PermissionDeniedError, () => ask({ model: 'claude-opus-4-6' }));
}

async function checkFaults(answered) {
  await fault({ mode: 'cut_after_deltas', n: 2, count: 1 });
  const broken = await fails(OpenAI.APIError, async () => all(await ask({ stream: true })));
  assert.equal(broken.code, 'model_unavailable');
  await fault({ mode: 'cut_after_deltas', n: 2, count: 1 });
  const refused = await fails(OpenAI.InternalServerError, () => ask({}, { maxRetries: 0 }));
  assert.deepEqual([refused.status, refused.type], [502, 'server_error']);
  // It is asked again by the client, by itself.
  await fault({ mode: 'cut_after_deltas', n: 2, count: 1 });
  assert.equal((await ask()).choices[0].message.content, answered.content);
}

async function checkLimit() {
  // The client waits for a minute at most, and the limit frees after up to 61 s.
  await new Promise((wake) => setTimeout(wake, 2_000));
  const refused = await fails(OpenAI.RateLimitError, () => ask({}, { maxRetries: 0 }, limited));
  assert.equal(refused.code, 'rate_limit_exceeded');
  assert.ok(Number(refused.headers.get('retry-after')) <= 60);
  // It waits as long as it is told to, and is answered.
  assert.ok((await ask({}, {}, limited)).choices[0].message.content);
}

// The limit is used up from here on.
await ask({}, {}, limited);
await checkModels();
const answered = await checkAnswer();
await checkHistory(answered);
await checkStream(answered);
await checkErrors();
await checkFaults(answered);
await checkLimit();
console.log('all is as the client expects');

//! How a question is answered: admitted first, then history beside the question's vector, then
//! passages, then the model; and settled, however it ends.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use shared::aws::ledger::Along;
use shared::clock::Timestamp;
use shared::conversation::{Citation, Exchange, Given, Turn};
use shared::error::{ApiError, Code};
use shared::gate::{Admission, Need};
use shared::idempotency::{IdempotencyKey, Stored};
use shared::ids::{ConversationId, MessageId};
use shared::ledger::Entry;
use shared::messages::MessagesRequest;
use shared::meter::Work;
use shared::model::{self, ModelEvent};
use shared::outbound::OutboundError;
use shared::pricing::Usage;
use shared::prompt::{self, AnswerReader, Inputs, Outline, Passage, Prompt};
use shared::retrieval::Wanted;
use shared::scope::TenantScope;
use shared::sealing::DataKey;
use shared::units::{NanoUsd, Tokens};
use shared::valve::Call;
use tokio::time::Instant;

use crate::Context;
use crate::question::{Asked, Question, searched};
use crate::wire::Wire;

/// What is reserved beyond the service's own count of a prompt, which is an estimate: one percent, and
/// at least so many tokens.
/// <https://docs.claude.com/en/docs/build-with-claude/token-counting>
const COUNT_MARGIN: u64 = 64;

/// An answer on its way.
pub(crate) struct Answering {
    id: MessageId,
    /// The conversation whose turn it becomes, if it becomes one.
    conversation: Option<ConversationId>,
    /// When that was begun, if it was before.
    begun_at: Option<Timestamp>,
    started: Timestamp,
    question: String,
    model_name: String,
    documents_retrieved: usize,
    input_most: Tokens,
    output_most: Tokens,
    upstream: model::Answer,
    reader: AnswerReader,
    ended: bool,
    text: String,
    citations: Vec<Citation>,
    /// What the turn is sealed with; there before anything was spent.
    seal: Option<Arc<DataKey>>,
    ticketed: Ticketed,
}

/// An admission, and what is known so far of what it will be charged.
struct Ticketed {
    admission: Admission,
    entry: Entry,
    call: Call,
}

/// What is known before the first word.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Meta {
    pub(crate) id: MessageId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) conversation_id: Option<ConversationId>,
    pub(crate) model: String,
    pub(crate) documents_retrieved: usize,
    /// When it was asked, in seconds.
    #[serde(skip)]
    pub(crate) created_s: i64,
}

/// The whole answer.
#[derive(Debug, Serialize)]
pub(crate) struct Done {
    pub(crate) id: MessageId,
    #[serde(skip_serializing_if = "Option::is_none")]
    conversation_id: Option<ConversationId>,
    pub(crate) response: String,
    pub(crate) model: String,
    pub(crate) citations: Vec<Citation>,
    pub(crate) usage: DoneUsage,
    pub(crate) latency_ms: u64,
    pub(crate) documents_retrieved: usize,
    /// When it was asked, in seconds.
    #[serde(skip)]
    pub(crate) created_s: i64,
    /// Why the model ended it, as the service says.
    #[serde(skip)]
    pub(crate) stop_reason: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct DoneUsage {
    #[serde(flatten)]
    pub(crate) model: Usage,
    pub(crate) embedding_tokens: Tokens,
    pub(crate) cost_nano_usd: NanoUsd,
}

/// What a question needs at most: everything, reserved before anything is known of it; and what it
/// takes to find out how much that really is.
fn needs(context: &Context, scope: &TenantScope, question: &Question, searched: &str) -> Vec<Need> {
    let at = context.clock.now();
    let finding_out = finding_out(context, searched, at);
    let outline = Outline {
        profile: scope.profile(),
        tier: scope.tier(),
        message: &question.message.text,
        preface: &question.preface,
        top_k: question.top_k,
        continues: question.conversation.is_some() || !question.history.is_empty(),
        max_context: Tokens(scope.limits().max_context_tokens),
        form: question.model.passages,
    };
    vec![answering(question, finding_out, outline.most_tokens(), at), finding_out]
}

/// What it takes to find out what a question is about.
fn finding_out(context: &Context, searched: &str, at: Timestamp) -> Need {
    let tokens = Tokens::most(searched);
    let cost = context.embedding_prices.cost(tokens, at) + context.retrieval.most_cost(at);
    Need { tokens, cost }
}

/// What the whole answer needs, where its prompt has `input` tokens at most.
fn answering(question: &Question, finding_out: Need, input: Tokens, at: Timestamp) -> Need {
    let output = Tokens(question.max_tokens);
    Need {
        tokens: finding_out.tokens + input + output,
        cost: finding_out.cost + question.model.most_cost(input, output, at),
    }
}

/// Does all that must succeed before an answer's first word, so that whatever fails here is still
/// answered with its own status.
pub(crate) async fn begin(
    context: &Context,
    scope: &mut TenantScope,
    asked: &Asked,
    mut question: Question,
    started: Timestamp,
    time: Time,
) -> Result<Answering, ApiError> {
    if let Err(shed) = context.valve.pass(scope.model_account(), scope.tier(), time.deadline).await {
        return Err(context.gate.shed(scope, shed).await);
    }
    let text = searched(&question.message.text);
    let mut checked_in = scope.epoch();
    let needs = |scope: &TenantScope| {
        if scope.epoch() != checked_in {
            question = Question::parse(asked, scope)?;
            checked_in = scope.epoch();
        }
        Ok(needs(context, scope, &question, &text))
    };
    let (admission, place) = context.gate.admit(scope, Work::Chat, needs, time.deadline).await?;
    let entry = Entry { injection: question.message.injection.clone(), ..Entry::default() };
    let mut ticketed = Ticketed { admission, entry, call: Call::default() };
    let exact = place > 0;
    let prepared = Box::pin(prepare(context, scope, &question, text, exact, &mut ticketed, time));
    match prepared.await {
        Ok(Prepared { upstream, reader, begun_at, documents_retrieved, input_most, seal }) => {
            let mut rng = context.entropy;
            let id = MessageId::new(&mut rng);
            let conversation = question.conversation.unwrap_or_else(|| ConversationId::new(&mut rng));
            Ok(Answering {
                id,
                conversation: question.keeps.then_some(conversation),
                begun_at,
                started,
                question: question.message.text,
                model_name: question.model_name,
                documents_retrieved,
                input_most,
                output_most: Tokens(question.max_tokens),
                upstream,
                reader,
                ended: false,
                text: String::new(),
                citations: Vec::new(),
                seal,
                ticketed,
            })
        }
        Err(error) => {
            fail(context, scope, ticketed, started, &error).await;
            Err(error)
        }
    }
}

/// By when a request has to be answered, and when Lambda ends it.
#[derive(Clone, Copy)]
pub(crate) struct Time {
    pub(crate) deadline: Instant,
    pub(crate) ends_at_s: i64,
}

/// Tells the other instances if the service is overloaded.
async fn note(context: &Context, scope: &TenantScope, error: &OutboundError) {
    if let Some(retry_after_ms) = error.overload() {
        context.valve.note_overloaded(scope.model_account(), retry_after_ms).await;
    }
}

/// Puts a failed request on the books. If that fails too, its lease expires and its bound is charged.
async fn fail(
    context: &Context,
    scope: &TenantScope,
    ticketed: Ticketed,
    started: Timestamp,
    error: &ApiError,
) {
    let Ticketed { admission, mut entry, call } = ticketed;
    entry.error = Some(error.code);
    entry.latency_ms = context.clock.now().millis_since(started);
    let record = context.gate.draft(scope, &admission, entry);
    let settled = context.gate.settle(scope, admission, record, Along::default());
    if let (Err(second), ()) = tokio::join!(settled, context.valve.end(call)) {
        tracing::error!("A failed request could not be settled: {second}");
    }
}

struct Prepared {
    upstream: model::Answer,
    reader: AnswerReader,
    /// When the conversation was begun that is continued, if one is.
    begun_at: Option<Timestamp>,
    documents_retrieved: usize,
    input_most: Tokens,
    seal: Option<Arc<DataKey>>,
}

async fn prepare(
    context: &Context,
    scope: &TenantScope,
    question: &Question,
    text: String,
    exact: bool,
    ticketed: &mut Ticketed,
    Time { deadline, ends_at_s }: Time,
) -> Result<Prepared, ApiError> {
    let Ticketed { admission, entry, call } = ticketed;
    let seal = Box::pin(context.data_keys.of(scope)).await?;
    let model = context.model(scope).await?;
    let collection = context.cells.read(scope, context.embeddings.model())?;
    let texts = [text];
    let trace = scope.note().trace();
    let now = context.clock.now();
    let (history, embedded, begun) = tokio::join!(
        history(context, scope, question, now),
        context.embeddings.embed(&texts, trace.as_ref(), deadline),
        context.valve.begin(scope.model_account(), ends_at_s)
    );
    *call = begun;
    let [text] = texts;
    let embedding_model = context.embeddings.model().name.clone();
    let vector = match embedded {
        Ok(embedded) => {
            entry.embedding = Some((embedding_model, embedded.tokens));
            embedded.vectors.into_iter().next().unwrap_or_default()
        }
        Err(error) => {
            if error.may_have_cost() {
                entry.embedding = Some((embedding_model, Tokens::most(&text)));
                entry.estimated = true;
            }
            return Err(error.into_api("the embedding model"));
        }
    };
    let (history, begun_at) = history?;
    let wanted = Wanted { text: &text, vector, top_k: question.top_k, now, deadline };
    let found = Box::pin(context.retrieval.find(scope, &collection, &context.documents, wanted)).await?;
    if let Some(reranked) = found.reranked {
        entry.rerank = Some(reranked.model);
        entry.estimated |= reranked.estimated;
    }
    let passages = found
        .hits
        .into_iter()
        .map(|hit| Passage {
            chunk_id: hit.chunk_id,
            document_id: hit.document_id,
            title: hit.title,
            source: hit.source,
            text: hit.text,
        })
        .collect();
    let (passages, in_passages) = prompt::screen_passages(passages, scope.profile().injection_policy);
    entry.injection.extend(in_passages);
    entry.injection.sort_unstable();
    entry.injection.dedup();
    if !entry.injection.is_empty() {
        tracing::warn!(injection.patterns = entry.injection.join(","), "Injection suspected");
    }

    let inputs = Inputs {
        profile: scope.profile(),
        tier: scope.tier(),
        message: &question.message.text,
        preface: &question.preface,
        passages,
        history: &history,
        max_context: Tokens(scope.limits().max_context_tokens),
        max_tokens: Tokens(question.max_tokens),
        form: question.model.passages,
    };
    let prompt = prompt::build(inputs, &mut context.entropy.clone())
        .map_err(|e| ApiError::new(Code::TooLarge, e.to_string()).with_param(question.message_param))?;
    let mut input_most = prompt.most_tokens();
    let Prompt { system, messages, passages, form } = prompt;
    let request = MessagesRequest {
        model: question.model_name.clone(),
        max_tokens: question.max_tokens,
        system,
        messages,
        stream: true,
    };
    let bound = answering(question, finding_out(context, &text, now), input_most, now);
    if exact || bound.tokens > admission.reserved() {
        // There was no room for the bound; there may be for the number.
        let counted =
            model.count(&request, trace.as_ref(), deadline).await.map_err(|e| e.into_api("the model"))?;
        // The service calls its count an estimate, which may differ from what it bills by a little.
        let counted = counted + Tokens((counted.0 / 100).max(COUNT_MARGIN));
        input_most = counted;
        let tokens = entry.embedding.as_ref().map_or(Tokens(0), |(_, tokens)| *tokens);
        let cost = context.embedding_prices.cost(tokens, now) + context.retrieval.most_cost(now);
        let spent = Need { tokens, cost };
        context.gate.extend(scope, admission, answering(question, spent, counted, now)).await?;
    }

    entry.documents = passages.iter().map(|p| p.document_id.clone()).collect();
    entry.documents.sort_unstable();
    entry.documents.dedup();
    entry.chunks = passages.iter().map(|p| p.chunk_id.clone()).collect();
    let documents_retrieved = entry.documents.len();
    match model.ask(&request, trace.as_ref(), deadline).await {
        Ok(upstream) => {
            let reader = AnswerReader::new(passages, form);
            Ok(Prepared { upstream, reader, begun_at, documents_retrieved, input_most, seal })
        }
        Err(error) => {
            let usage = if error.may_have_cost() {
                entry.estimated = true;
                let output_tokens = Tokens(question.max_tokens);
                Usage { input_tokens: input_most, output_tokens, ..Usage::default() }
            } else {
                Usage::default()
            };
            entry.model = Some((question.model_name.clone(), usage));
            note(context, scope, &error).await;
            Err(error.into_api("the model"))
        }
    }
}

/// What was said before, newest first, and when it was begun. A conversation that is not the user's own does not exist.
async fn history(
    context: &Context,
    scope: &TenantScope,
    question: &Question,
    now: Timestamp,
) -> Result<(Vec<Exchange>, Option<Timestamp>), ApiError> {
    match &question.conversation {
        None => Ok((question.history.clone(), None)),
        Some(id) => {
            let turns = context.conversations.history(scope, id, now).await?;
            let begun_at = turns.first().ok_or_else(ApiError::not_found)?.begun_at;
            Ok((turns.into_iter().map(Exchange::from).collect(), Some(begun_at)))
        }
    }
}

impl Answering {
    /// What is known before the first word.
    pub(crate) fn meta(&self) -> Meta {
        Meta {
            id: self.id.clone(),
            conversation_id: self.conversation.clone(),
            model: self.upstream.model().to_owned(),
            documents_retrieved: self.documents_retrieved,
            created_s: self.started.as_seconds(),
        }
    }

    /// Reads the answer to its end, and gives `show` its text as it comes.
    pub(crate) async fn read(
        &mut self,
        context: &Context,
        scope: &TenantScope,
        mut show: impl FnMut(&str),
    ) -> Result<(), ApiError> {
        while !self.ended {
            let event = match self.upstream.next().await {
                Ok(event) => event,
                Err(error) => {
                    note(context, scope, &error).await;
                    return Err(error.into_api("the model"));
                }
            };
            let text = match event {
                Some(ModelEvent::Text(delta)) => self.reader.text(&delta),
                Some(ModelEvent::Citation { passage }) => {
                    self.reader.cite(passage);
                    continue;
                }
                None => {
                    self.ended = true;
                    let (rest, citations) = self.reader.finish();
                    self.citations = citations;
                    rest
                }
            };
            if !text.is_empty() {
                if self.text.is_empty() {
                    let waited_ms = context.clock.now().millis_since(self.started);
                    scope.note().measure(|measured| measured.first_byte_ms = Some(waited_ms));
                }
                show(&text);
                self.text.push_str(&text);
            }
        }
        Ok(())
    }

    /// Settles the answer as it was `read`: the charge, the turn and the result for repeats together,
    /// and only then declares it done. What a caller was told is always on record.
    pub(crate) async fn settle(
        self,
        context: &Context,
        scope: &TenantScope,
        wire: Wire,
        read: Result<(), ApiError>,
        key: Option<&IdempotencyKey>,
    ) -> Result<Stored, ApiError> {
        let Ticketed { admission, mut entry, call } = self.ticketed;
        let (usage, bound) = self.upstream.usage(self.input_most, self.output_most);
        entry.model = Some((self.model_name.clone(), usage));
        entry.estimated |= bound;
        let ticketed = Ticketed { admission, entry, call };
        if let Err(error) = read {
            fail(context, scope, ticketed, self.started, &error).await;
            return Err(error);
        }
        let Ticketed { admission, mut entry, call } = ticketed;
        let now = context.clock.now();
        let latency_ms = now.millis_since(self.started);
        entry.latency_ms = latency_ms;
        entry.answer = Some(self.id.clone());
        let injection = entry.injection.clone();
        let record = context.gate.draft(scope, &admission, entry);
        let done = Done {
            id: self.id,
            conversation_id: self.conversation,
            response: self.text,
            model: self.upstream.model().to_owned(),
            citations: self.citations,
            usage: DoneUsage {
                model: usage,
                embedding_tokens: record.embedding_tokens,
                cost_nano_usd: record.cost_nano_usd,
            },
            latency_ms,
            documents_retrieved: self.documents_retrieved,
            created_s: self.started.as_seconds(),
            stop_reason: self.upstream.stop_reason().map(str::to_owned),
        };
        let body = wire.write(&done).map_err(|error| {
            tracing::error!("An answer does not serialise: {error}");
            ApiError::unavailable("the answer")
        })?;
        let stored = Stored { status: http::StatusCode::OK.as_u16(), body };
        // On whatever clock: each turn is later than the first.
        let after = |begun_at: Timestamp| self.started.max(begun_at.plus_millis(1));
        let asked_at = self.begun_at.map_or(self.started, after);
        let expires_at_s = asked_at.plus_days(scope.limits().data_retention_days).as_seconds();
        let given = Given {
            tenant_id: scope.tenant_id().clone(),
            id: done.id.clone(),
            user_id: scope.user_id().cloned(),
            conversation_id: done.conversation_id.clone(),
            asked_at,
            model: self.model_name.clone(),
            feedback: None,
            expires_at_s,
        };
        let turn = done.conversation_id.map(|conversation_id| Turn {
            tenant_id: scope.tenant_id().clone(),
            conversation_id,
            id: done.id,
            user_id: scope.user_id().cloned(),
            begun_at: self.begun_at.unwrap_or(asked_at),
            asked_at,
            question: self.question,
            answer: done.response,
            citations: done.citations,
            model: self.model_name.clone(),
            usage,
            embedding_tokens: record.embedding_tokens,
            cost_nano_usd: record.cost_nano_usd,
            latency_ms,
            injection,
            idempotency: key.map(|key| key.hash().to_owned()),
            feedback: None,
            expires_at_s,
        });
        let along = Along {
            turn: turn.as_ref().map(|turn| (&context.conversations, turn)),
            given: Some((&context.conversations, &given)),
            finished: key.map(|key| context.idempotency.finished(key, &stored, now)),
            seal: self.seal.as_deref(),
        };
        let fill = self.upstream.fill();
        let settled = context.gate.settle(scope, admission, record, along);
        let noted = async {
            context.valve.end(call).await;
            context.valve.note_limits(scope.model_account(), fill).await;
        };
        let (record, ()) = tokio::join!(settled, noted);
        record.map(|_| stored)
    }
}

//! How a question is answered: history beside the question's vector, then passages, then the model.

use serde::Serialize;
use shared::clock::Timestamp;
use shared::conversation::{Citation, Turn};
use shared::error::{ApiError, Code};
use shared::ids::{ConversationId, MessageId};
use shared::messages::MessagesRequest;
use shared::model::{self, ModelEvent};
use shared::pricing::{ChatModel, Usage};
use shared::prompt::{self, AnswerReader, Inputs, Passage, Prompt};
use shared::scope::TenantScope;
use shared::units::{NanoUsd, Tokens};
use tokio::time::Instant;

use crate::Context;
use crate::question::{Question, searched};

/// An answer on its way.
pub(crate) struct Answering {
    id: MessageId,
    conversation_id: ConversationId,
    started: Timestamp,
    question: String,
    model_name: String,
    model: &'static ChatModel,
    injection: Vec<String>,
    embedding_tokens: Tokens,
    documents_retrieved: usize,
    upstream: model::Answer,
    reader: AnswerReader,
    ended: bool,
    text: String,
    citations: Vec<Citation>,
}

/// What is known before the first word.
#[derive(Debug, Serialize)]
pub(crate) struct Meta<'a> {
    id: &'a MessageId,
    conversation_id: &'a ConversationId,
    model: &'a str,
    documents_retrieved: usize,
}

/// The whole answer.
#[derive(Debug, Serialize)]
pub(crate) struct Done {
    id: MessageId,
    conversation_id: ConversationId,
    response: String,
    model: String,
    citations: Vec<Citation>,
    usage: DoneUsage,
    latency_ms: u64,
    documents_retrieved: usize,
}

#[derive(Debug, Serialize)]
struct DoneUsage {
    #[serde(flatten)]
    model: Usage,
    embedding_tokens: Tokens,
    cost_nano_usd: NanoUsd,
}

/// Does all that must succeed before an answer's first word, so that whatever fails here is still
/// answered with its own status.
pub(crate) async fn begin(
    context: &Context,
    scope: &TenantScope,
    question: Question,
    started: Timestamp,
    deadline: Instant,
) -> Result<Answering, ApiError> {
    let collection = context.cells.read(scope, context.embeddings.model())?;
    let text = [searched(&question.message.text)];
    let (history, embedded) = tokio::try_join!(history(context, scope, &question, started), async {
        context.embeddings.embed(&text, deadline).await.map_err(|e| e.into_api("the embedding model"))
    })?;
    let vector = embedded.vectors.into_iter().next().unwrap_or_default();
    let [text] = text;
    let hits = collection.search(&text, vector, question.top_k).await?;
    let passages = hits
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
    let mut injection = question.message.injection;
    injection.extend(in_passages);
    injection.sort_unstable();
    injection.dedup();
    if !injection.is_empty() {
        tracing::warn!(injection.patterns = injection.join(","), "Injection suspected");
    }

    let inputs = Inputs {
        profile: scope.profile(),
        tier: scope.tier(),
        message: &question.message.text,
        passages,
        history: &history,
        max_context: Tokens(scope.limits().max_context_tokens),
        max_tokens: Tokens(question.max_tokens),
        form: question.model.passages,
    };
    let mut rng = context.entropy;
    let Prompt { system, messages, passages, form } = prompt::build(inputs, &mut rng)
        .map_err(|e| ApiError::new(Code::TooLarge, e.to_string()).with_param("message"))?;
    let mut documents: Vec<_> = passages.iter().map(|p| &p.document_id).collect();
    documents.sort_unstable();
    documents.dedup();
    let documents_retrieved = documents.len();
    let request = MessagesRequest {
        model: question.model_name.clone(),
        max_tokens: question.max_tokens,
        system,
        messages,
        stream: true,
    };
    let upstream = context.model.ask(&request, deadline).await.map_err(|e| e.into_api("the model"))?;
    Ok(Answering {
        id: MessageId::new(&mut rng),
        conversation_id: question.conversation.unwrap_or_else(|| ConversationId::new(&mut rng)),
        started,
        question: question.message.text,
        model_name: question.model_name,
        model: question.model,
        injection,
        embedding_tokens: embedded.tokens,
        documents_retrieved,
        upstream,
        reader: AnswerReader::new(passages, form),
        ended: false,
        text: String::new(),
        citations: Vec::new(),
    })
}

/// The turns before this one, newest first. A conversation that is not the user's own does not exist.
async fn history(
    context: &Context,
    scope: &TenantScope,
    question: &Question,
    now: Timestamp,
) -> Result<Vec<Turn>, ApiError> {
    match &question.conversation {
        None => Ok(Vec::new()),
        Some(id) => {
            let turns = context.conversations.history(scope, id, now).await?;
            if turns.is_empty() { Err(ApiError::not_found()) } else { Ok(turns) }
        }
    }
}

impl Answering {
    /// What is known before the first word.
    pub(crate) fn meta(&self) -> Meta<'_> {
        Meta {
            id: &self.id,
            conversation_id: &self.conversation_id,
            model: &self.model_name,
            documents_retrieved: self.documents_retrieved,
        }
    }

    /// More of the answer's text; `None` at its end.
    pub(crate) async fn next_text(&mut self) -> Result<Option<String>, ApiError> {
        while !self.ended {
            let text = match self.upstream.next().await.map_err(|e| e.into_api("the model"))? {
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
                self.text.push_str(&text);
                return Ok(Some(text));
            }
        }
        Ok(None)
    }

    /// Writes the turn down, and only then declares the answer done: what a caller was told is always
    /// on record.
    pub(crate) async fn settle(self, context: &Context, scope: &TenantScope) -> Result<Done, ApiError> {
        let now = context.clock.now();
        let usage = self.upstream.usage();
        let cost_nano_usd = self.model.cost(&usage, self.started)
            + context.embedding_prices.cost(self.embedding_tokens, self.started);
        let latency_ms = now.millis_since(self.started);
        let turn = Turn {
            tenant_id: scope.tenant_id().clone(),
            conversation_id: self.conversation_id,
            id: self.id,
            user_id: scope.user_id().cloned(),
            asked_at: self.started,
            question: self.question,
            answer: self.text,
            citations: self.citations,
            model: self.model_name,
            usage,
            embedding_tokens: self.embedding_tokens,
            cost_nano_usd,
            latency_ms,
            injection: self.injection,
            expires_at_s: self.started.plus_days(scope.limits().data_retention_days).as_seconds(),
        };
        context.conversations.add(scope, &turn).await?;
        tracing::info!(
            model = turn.model,
            tokens.input = usage.input_tokens.0,
            tokens.output = usage.output_tokens.0,
            tokens.cache_read = usage.cache_read_input_tokens.0,
            tokens.cache_creation = usage.cache_creation_input_tokens.0,
            tokens.embedding = turn.embedding_tokens.0,
            cost_nano_usd = cost_nano_usd.0,
            latency_ms,
            "Answer settled"
        );
        Ok(Done {
            id: turn.id,
            conversation_id: turn.conversation_id,
            response: turn.answer,
            model: self.upstream.model().to_owned(),
            citations: turn.citations,
            usage: DoneUsage { model: usage, embedding_tokens: turn.embedding_tokens, cost_nano_usd },
            latency_ms,
            documents_retrieved: self.documents_retrieved,
        })
    }
}

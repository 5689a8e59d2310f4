//! The ledger: what was done, for whom, and what it cost. One record for each ticket of a tenant, and
//! one for each event without one. Pure; [`crate::aws::ledger`] keeps the records.
//!
//! A record never holds what users wrote or what documents say, only what they are called.

use serde::{Deserialize, Serialize};

use crate::api_key::KeyId;
use crate::clock::Timestamp;
use crate::conversation::Rating;
use crate::credential::CredentialId;
use crate::deprovisioning::{Receipt, Saga};
use crate::error::Code;
use crate::ids::{ConversationId, DocumentId, MessageId, UserId};
use crate::meter::{BillingMonth, Charged, Day, Lease, Limit, Ticket, Work};
use crate::pricing::{self, Usage};
use crate::scope::{Expired, Operator, RequestId, Subject, TenantScope};
use crate::tenant::TenantId;
use crate::units::{NanoUsd, Tokens};

/// The line of the bill that carries what nobody reported: requests that ended without a word.
pub const UNREPORTED: &str = "unreported";

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// A question was put to a model.
    LlmCall,
    /// Passages were shown without a model.
    DocumentAccess,
    /// Documents were stored.
    DocumentIngested,
    /// A link was given by which a document's file can be put.
    UploadBegun,
    /// Requests were refused by `requests_per_minute` or `max_concurrent`.
    RateLimited,
    /// Requests were refused by a token budget.
    BudgetExhausted,
    /// Requests were refused because of who asked: a key that is not valid, or may not do this.
    AuthDenied,
    /// Requests were refused because they look like an injection.
    InjectionSuspected,
    /// Documents were listed.
    DocumentsListed,
    /// A document's description was read.
    DocumentRead,
    /// A document was deleted.
    DocumentDeleted,
    /// A user's conversations were listed.
    ConversationsListed,
    /// Turns of a conversation were read again, with what they cite.
    ConversationRead,
    /// A conversation was deleted.
    ConversationDeleted,
    /// A user said that an answer helped.
    FeedbackUp,
    /// A user said that an answer did not help.
    FeedbackDown,
    /// The models that may be asked for were listed.
    ModelsListed,
    /// A bill was read.
    UsageRead,
    /// The audit log was read.
    AuditRead,
    /// A bundle of the audit log was made, or its links renewed.
    AuditExported,
    /// A store answered with records of another tenant. They were dropped; it must never happen.
    IsolationAlert,
    /// Keys were listed.
    KeysListed,
    /// A key was made.
    KeyCreated,
    /// A key was replaced; it ends after its grace period.
    KeyRotated,
    /// A key was revoked.
    KeyRevoked,
    /// Issuers of tokens were listed, or one was read.
    IssuersRead,
    /// An issuer of tokens was registered.
    IssuerRegistered,
    /// An issuer was removed: its tokens let nobody in any more.
    IssuerRemoved,
    /// The tenant was told of a budget, and its receiver took it.
    WebhookDelivered,
    /// The tenant was to be told of a budget, and its receiver could not be reached, or wants nothing.
    WebhookFailed,
    /// An operator made the tenant, and its first key with it.
    TenantProvisioned,
    /// An operator read the tenant's record.
    TenantRead,
    /// An operator had the tenant's audit log verified.
    AuditVerified,
    /// An operator asked for the tenant to be deleted. Nothing of it is admitted from here on.
    TenantDeprovisioned,
    /// All that the tenant had is deleted; the record holds the receipt.
    #[serde(rename = "TENANT_DELETED")]
    TenantDeleted,
    /// Documents past their retention were deleted.
    DocumentExpired,
    /// An operator changed the tenant's record.
    TenantChanged,
    /// An operator switched the tenant off, and perhaps changed more of its record.
    TenantSuspended,
    /// An operator switched the tenant on again, and perhaps changed more of its record.
    TenantRestored,
    /// An operator was shown the tenant's key for webhooks.
    WebhookSecretRead,
}

/// Why requests were turned away before they got a ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Denial {
    /// By a limit.
    Limit(Limit),
    /// Because of who asked.
    Auth(Code),
    /// As an injection.
    Injection,
}

impl Denial {
    /// The denial that an error means, if it means one. Limits are the gate's to tell.
    pub const fn of(code: Code) -> Option<Self> {
        match code {
            Code::InjectionRefused => Some(Self::Injection),
            Code::InvalidKey
            | Code::InsufficientScope
            | Code::IpNotAllowed
            | Code::TenantSuspended
            | Code::ModelNotAllowed => Some(Self::Auth(code)),
            _ => None,
        }
    }
}

impl From<Denial> for Action {
    fn from(denial: Denial) -> Self {
        match denial {
            Denial::Limit(limit) => limit.into(),
            Denial::Auth(_) => Self::AuthDenied,
            Denial::Injection => Self::InjectionSuspected,
        }
    }
}

/// Who asked for what, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The request.
    pub request_id: RequestId,
    /// The key that was presented, or the issuer of the token that was.
    pub key_id: Option<CredentialId>,
    /// The tenant's user, as the tenant named it, or the token.
    pub user_id: Option<UserId>,
}

impl From<Work> for Action {
    fn from(work: Work) -> Self {
        match work {
            Work::Chat => Self::LlmCall,
            Work::Search => Self::DocumentAccess,
            Work::Ingestion => Self::DocumentIngested,
        }
    }
}

impl From<Limit> for Action {
    fn from(limit: Limit) -> Self {
        match limit {
            Limit::Requests | Limit::Concurrency | Limit::Account => Self::RateLimited,
            Limit::Day | Limit::Month => Self::BudgetExhausted,
        }
    }
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// As asked.
    Ok,
    /// With an error, which the record names.
    Failed,
    /// It was refused.
    Refused,
    /// Nobody said. Its lease expired; it is charged at its bound.
    Aborted,
}

/// A record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The tenant.
    pub tenant_id: TenantId,
    /// The number of the admission that it accounts for; events have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ticket: Option<Ticket>,
    /// When it was written.
    pub time: Timestamp,
    /// The day whose budget is charged: that of the admission.
    pub day: Day,
    /// Its month.
    pub month: BillingMonth,
    /// The tenant's user: as the tenant named it, or as the issuer vouched for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<UserId>,
    /// The key that was presented, or the issuer of the token that was: which of the two it is tells whether
    /// the user is asserted or verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<CredentialId>,
    /// The operator, by ARN, where it was one and not the tenant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operator: Option<String>,
    /// The request.
    pub request_id: RequestId,
    /// What was done.
    pub action: Action,
    /// How it ended.
    pub outcome: Outcome,
    /// The error, if it ended with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Code>,
    /// The limit, if one refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<String>,
    /// How many alike this record stands for.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub count: u64,
    /// The model that was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// What it used.
    pub usage: Usage,
    /// What it cost.
    pub model_cost_nano_usd: NanoUsd,
    /// The embedding model that was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding_model: Option<String>,
    /// What it used.
    pub embedding_tokens: Tokens,
    /// What it cost.
    pub embedding_cost_nano_usd: NanoUsd,
    /// The reranker that was asked, once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rerank_model: Option<String>,
    /// What it cost.
    #[serde(default, skip_serializing_if = "NanoUsd::is_zero")]
    pub rerank_cost_nano_usd: NanoUsd,
    /// Tokens of no known kind, charged at the bound that was reserved for them.
    pub unreported_tokens: Tokens,
    /// What they cost at most.
    pub unreported_cost_nano_usd: NanoUsd,
    /// All of it.
    pub cost_nano_usd: NanoUsd,
    /// Whether any of the numbers is a bound, because it was never reported.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub estimated: bool,
    /// Documents shown or stored.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub documents: Vec<DocumentId>,
    /// Passages shown.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chunks: Vec<String>,
    /// The conversation that was read or deleted; or the answer that was given, or rated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// Injection patterns found, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub injection: Vec<String>,
    /// Keys made, replaced or revoked, of a replacement the old one first; issuers registered or removed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<CredentialId>,
    /// What an operator changed, by the names of the fields.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changed: Vec<String>,
    /// How long it took, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<u64>,
    /// What was deleted with the tenant, and what is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Receipt>,
}

const fn one() -> u64 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_one(count: &u64) -> bool {
    *count == 1
}

/// What an admitted request did, as the function that did it says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Why it failed, if it did.
    pub error: Option<Code>,
    /// The model that was asked and what it used.
    pub model: Option<(String, Usage)>,
    /// The embedding model that was asked and what it used.
    pub embedding: Option<(String, Tokens)>,
    /// The reranker that was asked once, if one was.
    pub rerank: Option<String>,
    /// Whether any of these is a bound rather than a report.
    pub estimated: bool,
    /// Documents shown or stored.
    pub documents: Vec<DocumentId>,
    /// Passages shown.
    pub chunks: Vec<String>,
    /// The answer that was given, if one was.
    pub answer: Option<MessageId>,
    /// Injection patterns found, by name.
    pub injection: Vec<String>,
    /// How long it took, in milliseconds.
    pub latency_ms: u64,
}

/// One line of a record: what is added to one line of the month's bill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// The model, or [`UNREPORTED`].
    pub model: &'a str,
    /// Requests: each counts on one line.
    pub requests: u64,
    /// Tokens of the model.
    pub usage: Usage,
    /// Tokens of the embedding model.
    pub embedding_tokens: Tokens,
    /// Tokens of no known kind.
    pub unreported_tokens: Tokens,
    /// What they cost.
    pub cost: NanoUsd,
    /// Answers that helped, and that did not.
    pub feedback: (u64, u64),
    /// How long the request took, where this line counts it.
    pub latency_ms: Option<u64>,
}

impl Record {
    fn blank(tenant_id: TenantId, action: Action, time: Timestamp, request_id: RequestId) -> Self {
        Self {
            tenant_id,
            ticket: None,
            time,
            day: Day::of(time.as_seconds()),
            month: BillingMonth::of(time.as_seconds()),
            user_id: None,
            key_id: None,
            operator: None,
            request_id,
            action,
            outcome: Outcome::Ok,
            error: None,
            limit: None,
            count: 1,
            model: None,
            usage: Usage::default(),
            model_cost_nano_usd: NanoUsd(0),
            embedding_model: None,
            embedding_tokens: Tokens(0),
            embedding_cost_nano_usd: NanoUsd(0),
            rerank_model: None,
            rerank_cost_nano_usd: NanoUsd(0),
            unreported_tokens: Tokens(0),
            unreported_cost_nano_usd: NanoUsd(0),
            cost_nano_usd: NanoUsd(0),
            estimated: false,
            documents: Vec::new(),
            chunks: Vec::new(),
            subject: None,
            injection: Vec::new(),
            keys: Vec::new(),
            changed: Vec::new(),
            latency_ms: None,
            receipt: None,
        }
    }

    /// The record of a request that was admitted under `lease`, at the prices of that moment.
    pub fn settled(scope: &TenantScope, lease: &Lease, ticket: Ticket, entry: Entry, now: Timestamp) -> Self {
        let at = Timestamp::from_millis(lease.admitted_at_s.saturating_mul(1_000));
        let request = scope.request_id().clone();
        let mut record = Self {
            ticket: Some(ticket),
            day: lease.day(),
            month: lease.month(),
            user_id: scope.user_id().cloned(),
            key_id: Some(scope.credential().clone()),
            outcome: if entry.error.is_some() { Outcome::Failed } else { Outcome::Ok },
            error: entry.error,
            estimated: entry.estimated,
            documents: entry.documents,
            chunks: entry.chunks,
            subject: entry.answer.map(String::from),
            injection: entry.injection,
            latency_ms: Some(entry.latency_ms),
            ..Self::blank(scope.tenant_id().clone(), lease.work.into(), now, request)
        };
        if let Some((model, usage)) = entry.model {
            record.model_cost_nano_usd =
                pricing::chat_model(&model).map_or(NanoUsd(0), |m| m.cost(&usage, at));
            record.model = Some(model);
            record.usage = usage;
        }
        if let Some((model, tokens)) = entry.embedding {
            record.embedding_cost_nano_usd =
                pricing::embedding_model(&model).map_or(NanoUsd(0), |m| m.cost(tokens, at));
            record.embedding_model = Some(model);
            record.embedding_tokens = tokens;
        }
        if let Some(model) = entry.rerank {
            record.rerank_cost_nano_usd = pricing::rerank_model(&model).map_or(NanoUsd(0), |m| m.cost(at));
            record.rerank_model = Some(model);
        }
        record.cost_nano_usd =
            record.model_cost_nano_usd + record.embedding_cost_nano_usd + record.rerank_cost_nano_usd;
        record
    }

    /// The record of a request whose lease expired before anybody wrote one: charged at its bound,
    /// since what it used is unknown, and more it cannot be.
    pub fn aborted(tenant_id: TenantId, lease: &Lease, ticket: Ticket, now: Timestamp) -> Self {
        Self {
            ticket: Some(ticket),
            day: lease.day(),
            month: lease.month(),
            outcome: Outcome::Aborted,
            unreported_tokens: lease.tokens,
            unreported_cost_nano_usd: lease.cost,
            cost_nano_usd: lease.cost,
            estimated: lease.tokens > Tokens(0),
            ..Self::blank(tenant_id, lease.work.into(), now, RequestId::from(lease.request.clone()))
        }
    }

    /// The record of `count` requests that were turned away; `asked` is the last of them. Of many, it
    /// names the request alone: the others may have been other people's.
    pub fn denied(tenant_id: TenantId, denial: Denial, count: u64, now: Timestamp, asked: Asked) -> Self {
        let Asked { request_id, key_id, user_id } = asked;
        let (limit, error) = match denial {
            Denial::Limit(limit) => (Some(limit.name().to_owned()), None),
            Denial::Auth(code) => (None, Some(code)),
            Denial::Injection => (None, Some(Code::InjectionRefused)),
        };
        Self {
            outcome: Outcome::Refused,
            limit,
            error,
            count,
            key_id: key_id.filter(|_| count == 1),
            user_id: user_id.filter(|_| count == 1),
            ..Self::blank(tenant_id, denial.into(), now, request_id)
        }
    }

    /// The record of a request to which the stores answered with `count` records of other tenants.
    pub fn isolation_alert(tenant_id: TenantId, count: u64, now: Timestamp, asked: Asked) -> Self {
        let Asked { request_id, key_id, user_id } = asked;
        Self {
            outcome: Outcome::Refused,
            count,
            key_id,
            user_id,
            ..Self::blank(tenant_id, Action::IsolationAlert, now, request_id)
        }
    }

    /// The record of something that a tenant did and that costs nothing.
    pub fn event(scope: &TenantScope, action: Action, documents: Vec<DocumentId>, now: Timestamp) -> Self {
        Self {
            user_id: scope.user_id().cloned(),
            key_id: Some(scope.credential().clone()),
            documents,
            ..Self::blank(scope.tenant_id().clone(), action, now, scope.request_id().clone())
        }
    }

    /// The record of passages of a conversation that are shown again.
    pub fn shown_again(
        scope: &TenantScope,
        conversation: &ConversationId,
        documents: Vec<DocumentId>,
        chunks: Vec<String>,
        now: Timestamp,
    ) -> Self {
        let subject = Some(conversation.to_string());
        Self { chunks, subject, ..Self::event(scope, Action::ConversationRead, documents, now) }
    }

    /// The record of a conversation's deletion.
    pub fn conversation_deleted(scope: &TenantScope, conversation: &ConversationId, now: Timestamp) -> Self {
        let subject = Some(conversation.to_string());
        Self { subject, ..Self::event(scope, Action::ConversationDeleted, Vec::new(), now) }
    }

    /// The record of what a user says of an answer of `model`.
    pub fn rated(
        scope: &TenantScope,
        answer: &MessageId,
        model: String,
        rating: Rating,
        now: Timestamp,
    ) -> Self {
        let action = match rating {
            Rating::Up => Action::FeedbackUp,
            Rating::Down => Action::FeedbackDown,
        };
        let (subject, model) = (Some(answer.to_string()), Some(model));
        Self { subject, model, ..Self::event(scope, action, Vec::new(), now) }
    }

    /// The record of something that an operator did to a tenant; `key_id` is the key that came of it.
    pub fn operation(
        operator: &Operator,
        tenant_id: TenantId,
        action: Action,
        key_id: Option<KeyId>,
        now: Timestamp,
    ) -> Self {
        Self {
            operator: Some(operator.arn().to_owned()),
            key_id: key_id.map(CredentialId::from),
            ..Self::blank(tenant_id, action, now, operator.request_id().clone())
        }
    }

    /// The last record of a tenant that is deleted, with its receipt. The same saga makes the same record.
    pub fn deleted(saga: &Saga, receipt: Receipt) -> Self {
        let time = receipt.verified_at;
        Self {
            operator: Some(saga.operator.clone()),
            receipt: Some(receipt),
            ..Self::blank(saga.tenant_id.clone(), Action::TenantDeleted, time, saga.request_id.clone())
        }
    }

    /// The record of documents that were deleted because they are past their retention.
    pub fn expired(
        expired: &Expired,
        documents: Vec<DocumentId>,
        request_id: RequestId,
        now: Timestamp,
    ) -> Self {
        let tenant_id = expired.tenant_id().clone();
        Self { documents, ..Self::blank(tenant_id, Action::DocumentExpired, now, request_id) }
    }

    /// The same record, of something that was done to `keys`.
    #[must_use]
    pub fn about<Id: Into<CredentialId>>(self, keys: Vec<Id>) -> Self {
        Self { keys: keys.into_iter().map(Into::into).collect(), ..self }
    }

    /// The record of what became of the message `id` about a budget; `limit` is that budget.
    pub fn webhook(tenant_id: TenantId, id: &str, limit: &str, delivered: bool, now: Timestamp) -> Self {
        let (action, outcome) = if delivered {
            (Action::WebhookDelivered, Outcome::Ok)
        } else {
            (Action::WebhookFailed, Outcome::Failed)
        };
        Self {
            outcome,
            limit: Some(limit.to_owned()),
            ..Self::blank(tenant_id, action, now, RequestId::from(id.to_owned()))
        }
    }

    /// What the meter charges for it.
    pub fn charged(&self) -> Charged {
        Charged {
            day: self.day,
            month: self.month,
            tokens: self.usage.total() + self.embedding_tokens + self.unreported_tokens,
            cost: self.cost_nano_usd,
        }
    }

    /// What it adds to the month's bill, by line. Events without a ticket add nothing, but for what users say
    /// of answers.
    pub fn lines(&self) -> Vec<Line<'_>> {
        let blank = |model| Line {
            model,
            requests: 0,
            usage: Usage::default(),
            embedding_tokens: Tokens(0),
            unreported_tokens: Tokens(0),
            cost: NanoUsd(0),
            feedback: (0, 0),
            latency_ms: None,
        };
        let feedback = match self.action {
            Action::FeedbackUp => (1, 0),
            Action::FeedbackDown => (0, 1),
            _ => (0, 0),
        };
        if self.ticket.is_none() {
            let rated = self.model.iter().filter(|_| feedback != (0, 0));
            return rated.map(|model| Line { feedback, ..blank(model) }).collect();
        }
        let mut lines = Vec::new();
        if let Some(model) = &self.model {
            lines.push(Line { usage: self.usage, cost: self.model_cost_nano_usd, ..blank(model) });
        }
        if let Some(model) = &self.embedding_model {
            let (embedding_tokens, cost) = (self.embedding_tokens, self.embedding_cost_nano_usd);
            lines.push(Line { embedding_tokens, cost, ..blank(model) });
        }
        if let Some(model) = &self.rerank_model {
            lines.push(Line { cost: self.rerank_cost_nano_usd, ..blank(model) });
        }
        if lines.is_empty() || self.outcome == Outcome::Aborted {
            let (unreported_tokens, cost) = (self.unreported_tokens, self.unreported_cost_nano_usd);
            lines.push(Line { unreported_tokens, cost, ..blank(UNREPORTED) });
        }
        if let Some(first) = lines.first_mut() {
            first.requests = 1;
            first.latency_ms = self.latency_ms;
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease() -> Lease {
        "c.1795000000.130.5000.70000.r-1".parse().unwrap()
    }

    #[test]
    fn an_aborted_request_is_charged_its_bound_in_the_month_it_began() {
        let now = Timestamp::parse("2026-12-01T00:00:05Z").unwrap();
        let record = Record::aborted("acme".parse().unwrap(), &lease(), Ticket(7), now);
        let (day, month) = (lease().day(), lease().month());
        assert_eq!(record.charged(), Charged { day, month, tokens: Tokens(5_000), cost: NanoUsd(70_000) });
        assert_eq!(record.month.to_string(), "2026-11");
        let lines = record.lines();
        assert_eq!((lines.len(), lines[0].model, lines[0].requests), (1, UNREPORTED, 1));
    }

    /// An item of a table has at most 400 KB. Every part of a record is bounded where it comes in: here is
    /// the largest that can be made of those parts.
    #[test]
    fn the_largest_record_fits_its_item() {
        let now = Timestamp::from_millis(i64::from(u32::MAX) * 1_000);
        let mut record = Record::aborted("a".repeat(32).parse().unwrap(), &lease(), Ticket(u64::MAX), now);
        record.user_id = Some("\u{10ffff}".repeat(64).parse().unwrap());
        record.operator = Some("o".repeat(2_048));
        let document = "d".repeat(128);
        // A hundred documents to a request, a hundred passages to a search.
        record.documents = vec![document.parse().unwrap(); 100];
        record.chunks = vec![format!("{document}:{}", "0".repeat(16)); 100];
        record.injection = vec!["p".repeat(64); 100];
        record.subject = Some("s".repeat(64));
        record.changed = vec!["limits.monthly_token_budget".into(); 20];
        record.model = Some("m".repeat(256));
        record.embedding_model = record.model.clone();
        record.rerank_model = record.model.clone();
        assert!("x".repeat(257).parse::<UserId>().is_err() && "x".repeat(129).parse::<DocumentId>().is_err());
        let size = serde_json::to_vec(&record).unwrap().len();
        assert!(size < 64 << 10, "{size} bytes");
    }

    #[test]
    fn the_lines_add_up_to_the_record() {
        let mut record =
            Record::aborted("acme".parse().unwrap(), &lease(), Ticket(7), Timestamp::from_millis(0));
        record.outcome = Outcome::Ok;
        (record.unreported_tokens, record.unreported_cost_nano_usd) = (Tokens(0), NanoUsd(0));
        record.model = Some("m".into());
        record.usage = Usage { input_tokens: Tokens(3), output_tokens: Tokens(4), ..Usage::default() };
        record.model_cost_nano_usd = NanoUsd(50);
        record.embedding_model = Some("e".into());
        record.embedding_tokens = Tokens(5);
        record.embedding_cost_nano_usd = NanoUsd(6);
        record.rerank_model = Some("r".into());
        record.rerank_cost_nano_usd = NanoUsd(7);
        record.cost_nano_usd = NanoUsd(63);
        let lines = record.lines();
        assert_eq!(lines.iter().map(|l| l.cost.0).sum::<u64>(), record.cost_nano_usd.0);
        assert_eq!(lines.iter().map(|l| l.requests).sum::<u64>(), 1);
        assert_eq!(record.charged().tokens, Tokens(12));
        let asked = Asked { request_id: RequestId::from("r".to_owned()), key_id: None, user_id: None };
        let (denial, now) = (Denial::Limit(Limit::Requests), Timestamp::from_millis(0));
        assert!(Record::denied("acme".parse().unwrap(), denial, 9, now, asked).lines().is_empty());
    }
}

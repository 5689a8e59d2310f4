//! The keys of every item in every table, built here and nowhere else.
//!
//! A partition key is a bare [`TenantId`](crate::tenant::TenantId), but for [`claim`]; sort keys are a prefix that names
//! the kind, `#`, and identifiers none of which can hold `#`. So no two things share a key, and a
//! prefix query finds one kind alone.

use crate::api_key::KeyId;
use crate::clock::Timestamp;
use crate::deprovisioning::DeprovisioningId;
use sha2::{Digest, Sha256};

use crate::ids::{ConversationId, DocumentId, IssuerId, MessageId, UploadId, UserId};
use crate::issuer::Provenance;
use crate::meter::{BillingMonth, Ticket};
#[cfg(feature = "webhooks")]
use crate::webhook::Period;

/// The partition key attribute of every table.
pub const PARTITION: &str = "tenant_id";
/// The sort key attribute of every table that has one.
pub const SORT: &str = "sk";

/// Table `tenants`: the tenant's record.
pub const TENANT: &str = "CONFIG";

/// Table `tenants`: what every key's record starts with.
pub const API_KEYS: &str = "KEY#";

/// Table `tenants`: the claim of whoever is at work on the tenant's collections.
pub const CLAIM: &str = "CLAIM";

/// Table `tenants`: a key's record.
pub fn api_key(id: &KeyId) -> String {
    format!("{API_KEYS}{id}")
}

/// Table `tenants`: what every issuer's record starts with.
pub const ISSUERS: &str = "ISSUER#";

/// Table `tenants`: an issuer's record.
pub fn issuer(id: &IssuerId) -> String {
    format!("{ISSUERS}{id}")
}

/// Table `tenants`: the partition of the item that says whose tokens of that provenance are. No tenant's id
/// has a `#`, so no tenant's partition is meant.
pub fn claim(provenance: Provenance<'_>) -> String {
    format!("issuer#{}", provenance.digest())
}

/// Table `tenants`: that item's sort key.
pub const ISSUER_CLAIM: &str = "CLAIM";

/// Table `tenants`: what the notes of a tenant's claims start with.
pub const CLAIMS: &str = "CLAIM#";

/// Table `tenants`: in the tenant's own partition, the note that it has that claim, for whoever has to find all
/// of them.
pub fn claim_note(provenance: Provenance<'_>) -> String {
    format!("{CLAIMS}{}", provenance.digest())
}

/// Table `tenants`: that an operator's request with that idempotency key, given as its hash, has made a key.
pub fn made(hash: &str) -> String {
    format!("MADE#{hash}")
}

/// Table `tenants`: how many keys were ever made.
pub const KEYS: &str = "KEYS";

/// Table `tenants`: how many issuers were ever registered.
pub const ISSUERS_MADE: &str = "ISSUERS";

/// Table `tenants`: the attribute of an issuer's claim that names its tenant.
pub const CLAIM_HOLDER: &str = "holder";

/// Table `tenants`: what the partition of every issuer's claim starts with.
pub const ISSUER_CLAIMS: &str = "issuer#";

/// Table `tenants`: what every deprovisioning starts with.
pub const DEPROVISIONINGS: &str = "DEPROVISIONING#";

/// Table `tenants`: one deprovisioning.
pub fn deprovisioning(id: &DeprovisioningId) -> String {
    format!("{DEPROVISIONINGS}{}", id.tail())
}

/// Table `tenants`: the partition of the deprovisionings that are not over, each under its tenant's id. In
/// no tenant's partition: a tenant's id holds no upper-case letter.
pub const OPEN_DEPROVISIONINGS: &str = "DEPROVISIONING";

/// Tables `conversations` and `documents`: the attribute of the data key that has sealed the item's text.
pub const DATA_KEY: &str = "data_key";

/// Table `conversations`: what every turn starts with.
pub const TURNS: &str = "CONV#";

/// Table `conversations`: what every turn of a conversation starts with.
pub fn turns(conversation: &ConversationId) -> String {
    format!("{TURNS}{conversation}#")
}

/// Table `conversations`: one turn. Turns of a conversation sort by the time they were asked; the
/// answer's id tells apart those of one millisecond.
pub fn turn(conversation: &ConversationId, asked_at: Timestamp, id: &MessageId) -> String {
    format!("CONV#{conversation}#{:015}#{id}", asked_at.as_millis())
}

/// Table `conversations`: what every listed conversation starts with.
pub const CONVERSATIONS: &str = "LIST#";

/// Table `conversations`: what every listed conversation of a user starts with, or of nobody in particular. A
/// user's name may hold anything, so its hash stands for it.
pub fn conversations(user: Option<&UserId>) -> String {
    let whose = user.map(|user| hex::encode(Sha256::digest(user.as_str())));
    format!("{CONVERSATIONS}{}#", whose.as_deref().unwrap_or("nobody"))
}

/// Table `conversations`: one listed conversation. A user's sort by the time they were begun.
pub fn conversation(user: Option<&UserId>, begun_at: Timestamp, id: &ConversationId) -> String {
    format!("{}{:015}#{id}", conversations(user), begun_at.as_millis())
}

/// Table `conversations`: what every answer starts with.
pub const ANSWERS: &str = "ANSWER#";

/// Table `conversations`: an answer, by its id alone.
pub fn answer(id: &MessageId) -> String {
    format!("{ANSWERS}{id}")
}

/// Table `documents`: what every document starts with.
pub const DOCUMENTS: &str = "DOC#";

/// Table `documents`: how many documents the tenant has. Changes with them, in the same transactions.
pub const DOCUMENT_COUNT: &str = "COUNT";

/// Table `documents`: one document.
pub fn document(id: &DocumentId) -> String {
    format!("{DOCUMENTS}{id}")
}

/// Table `documents`: what every upload that is under way starts with.
pub const UPLOADS: &str = "UPLOAD#";

/// Table `documents`: one upload.
pub fn upload(id: &UploadId) -> String {
    format!("{UPLOADS}{id}")
}

/// Table `audit`: the record of a ticket. Tickets sort by number.
pub fn ticket(ticket: Ticket) -> String {
    format!("{TICKETS}{:012}", ticket.0)
}

/// Table `audit`: what the record of every ticket starts with.
pub const TICKETS: &str = "TICKET#";

/// Table `audit`: what every event starts with.
pub const EVENTS: &str = "EVENT#";

/// Table `audit`: an event without a ticket. Events sort by time; the tail, a hash of the record, tells
/// apart those of one millisecond.
pub fn event(time: Timestamp, tail: &str) -> String {
    format!("{EVENTS}{:015}#{tail}", time.as_millis())
}

/// Table `usage`: what every line of every month starts with.
pub const USAGE: &str = "USAGE#";

/// Table `usage`: what every line of a month starts with.
pub fn usage_month(month: BillingMonth) -> String {
    format!("USAGE#{month}#")
}

/// Table `usage`: a month's line of one model.
pub fn usage_line(month: BillingMonth, model: &str) -> String {
    format!("USAGE#{month}#{model}")
}

/// Table `audit`: the index of the records that are not exported yet, by when they were written.
pub const PENDING_INDEX: &str = "pending";
/// Table `audit`: the index's sort key. A record has it until it is exported.
pub const PENDING: &str = "pending";

/// Table `audit`: where the record under the sort key `sort` stands among those not exported yet.
pub fn pending(time: Timestamp, sort: &str) -> String {
    format!("{:015}#{sort}", time.as_millis())
}

/// Table `usage`: how far the tenant's audit log goes.
pub const CHAIN: &str = "CHAIN";

/// Table `webhooks`: what every message of a tenant starts with.
pub const WEBHOOKS: &str = "HOOK#";

/// Table `webhooks`: what every message about a period starts with.
#[cfg(feature = "webhooks")]
pub fn webhooks(period: Period) -> String {
    format!("{WEBHOOKS}{}#{period}#", period.kind())
}

/// Table `webhooks`: the message about a threshold.
#[cfg(feature = "webhooks")]
pub fn webhook(period: Period, percent: u8) -> String {
    format!("{}{percent:03}", webhooks(period))
}

/// Table `webhooks`: the index of the messages that are to be delivered.
pub const DUE_INDEX: &str = "due";
/// Table `webhooks`: the index's sort key. A message has it until it is delivered or given up.
pub const DUE: &str = "due_at";

/// Table `conversations`: what became of the request with that idempotency key, given as its hash.
pub fn idempotency(hash: &str) -> String {
    format!("IDEM#{hash}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::entropy;

    #[test]
    fn turns_sort_by_time_under_their_conversation_alone() {
        let mut rng = entropy();
        let conversation = ConversationId::new(&mut rng);
        let key = |ms| turn(&conversation, Timestamp::from_millis(ms), &MessageId::new(&mut entropy()));
        assert!(key(9) < key(10));
        assert!(key(999_999_999_999) < key(1_000_000_000_000));
        assert!(key(1).starts_with(&turns(&conversation)));
        assert!(!key(1).starts_with(&turns(&ConversationId::new(&mut rng))));
    }

    #[test]
    fn a_users_conversations_sort_by_time_under_that_user_alone() {
        let id = ConversationId::new(&mut entropy());
        let user = |name: &str| name.parse::<UserId>().unwrap();
        let key = |user: Option<&UserId>, ms| conversation(user, Timestamp::from_millis(ms), &id);
        let (ann, other) = (user("ann"), user("ann#0"));
        assert!(key(Some(&ann), 9) < key(Some(&ann), 10));
        assert!(key(Some(&ann), 1).starts_with(&conversations(Some(&ann))));
        assert!(!key(Some(&other), 1).starts_with(&conversations(Some(&ann))));
        assert!(!key(Some(&user("nobody")), 1).starts_with(&conversations(None)));
    }
}

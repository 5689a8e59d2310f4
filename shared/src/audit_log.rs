//! The audit log as it is exported: objects of gzipped JSON lines, chained by hash. Pure.
//!
//! Each tenant has a chain of its own. An object holds whole records of one hour, one a line; each line
//! says its place in the chain, its object's number, the hash of the object before and until when the
//! store must keep it. So any change, gap or reordering shows in files alone, and each line can be
//! queried as it stands.
//!
//! An object is named after its day and the place of its first line. Beside the objects, a tenant's
//! [`HEAD`] says where its chain ends, so that the last object cannot go missing unnoticed.

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};

use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::clock::{Timestamp, rfc3339};
use crate::credential::CredentialId;
use crate::deprovisioning::Receipt;
use crate::error::Code;
use crate::ids::{DocumentId, UserId};
use crate::ledger::{Action, Outcome, Record};
use crate::meter::{BillingMonth, Day, Ticket};
use crate::pricing::Usage;
use crate::scope::RequestId;
use crate::tenant::TenantId;
use crate::units::{NanoUsd, Tokens};

/// The longest line that is read, in bytes: far above what an item of the ledger can hold.
const MOST_LINE_BYTES: u64 = 4 << 20;

/// The SHA-256 of an object's bytes, as 64 hexadecimal digits. The first object of a chain names one of
/// all zeros.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ObjectHash(String);

/// A text that is no hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a hash is 64 lower-case hexadecimal digits")]
pub struct InvalidHash;

impl ObjectHash {
    /// What the first object of a chain names as the one before.
    pub fn none() -> Self {
        Self("0".repeat(64))
    }

    /// The hash of an object.
    pub fn of(object: &[u8]) -> Self {
        Self(hex::encode(Sha256::digest(object)))
    }
}

impl TryFrom<String> for ObjectHash {
    type Error = InvalidHash;
    fn try_from(text: String) -> Result<Self, InvalidHash> {
        let digits = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if text.len() == 64 && text.bytes().all(digits) { Ok(Self(text)) } else { Err(InvalidHash) }
    }
}

impl From<ObjectHash> for String {
    fn from(hash: ObjectHash) -> Self {
        hash.0
    }
}

impl fmt::Display for ObjectHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How far a tenant's chain goes. It is also what the file [`HEAD`] holds, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Objects in it.
    pub objects: u64,
    /// Lines in it.
    pub lines: u64,
    /// The hash of its last object.
    pub last: ObjectHash,
}

impl Default for Head {
    fn default() -> Self {
        Self { objects: 0, lines: 0, last: ObjectHash::none() }
    }
}

/// The name, after the tenant's prefix, of the object that holds the [`Head`]. Every version of it is
/// kept; the latest counts.
pub const HEAD: &str = "head.json";

/// A line: a record and its place in the chain. The names are those of the API where it has them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Its place in the tenant's chain: 1, 2, 3 …
    pub position: u64,
    /// Its object's place: 1, 2, 3 …
    pub object: u64,
    /// The hash of the object before.
    pub previous: ObjectHash,
    /// Until when the store keeps the object from being changed or removed.
    #[serde(with = "rfc3339")]
    pub retain_until: Timestamp,
    /// The record.
    #[serde(flatten)]
    pub record: WireRecord,
}

/// A record as it is exported and as the API shows it. Nothing of a [`Record`] is lost in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(
    missing_docs,
    reason = "each field is the one of the same name in `Record`, or the API's name of it"
)]
pub struct WireRecord {
    /// Unique within the tenant; sorts as the ledger does.
    pub id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ticket: Option<Ticket>,
    #[serde(with = "rfc3339")]
    pub time: Timestamp,
    pub tenant_id: TenantId,
    #[serde(with = "as_text")]
    pub day: Day,
    #[serde(with = "as_text")]
    pub month: BillingMonth,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<UserId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<CredentialId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operator: Option<String>,
    pub request_id: RequestId,
    pub action: Action,
    pub outcome: Outcome,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Code>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<String>,
    pub count: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    pub input_tokens: Tokens,
    pub output_tokens: Tokens,
    pub cache_read_input_tokens: Tokens,
    pub cache_creation_input_tokens: Tokens,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding_model: Option<String>,
    pub embedding_tokens: Tokens,
    pub unreported_tokens: Tokens,
    pub estimated: bool,
    pub model_cost_nano_usd: NanoUsd,
    pub embedding_cost_nano_usd: NanoUsd,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rerank_model: Option<String>,
    #[serde(default, skip_serializing_if = "NanoUsd::is_zero")]
    pub rerank_cost_nano_usd: NanoUsd,
    pub unreported_cost_nano_usd: NanoUsd,
    pub cost_nano_usd: NanoUsd,
    pub documents: Vec<DocumentId>,
    pub chunks: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    pub injection: Vec<String>,
    // Records from before there was such a thing lack it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<CredentialId>,
    // Left out where it is empty: an object that was intended before there was such a field stays the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changed: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Receipt>,
}

impl WireRecord {
    /// The record that the ledger keeps under `id`.
    pub fn new(id: String, record: Record) -> Self {
        Self {
            id,
            ticket: record.ticket,
            time: record.time,
            tenant_id: record.tenant_id,
            day: record.day,
            month: record.month,
            user_id: record.user_id,
            key_id: record.key_id,
            operator: record.operator,
            request_id: record.request_id,
            action: record.action,
            outcome: record.outcome,
            error: record.error,
            limit: record.limit,
            count: record.count,
            model: record.model,
            input_tokens: record.usage.input_tokens,
            output_tokens: record.usage.output_tokens,
            cache_read_input_tokens: record.usage.cache_read_input_tokens,
            cache_creation_input_tokens: record.usage.cache_creation_input_tokens,
            embedding_model: record.embedding_model,
            embedding_tokens: record.embedding_tokens,
            unreported_tokens: record.unreported_tokens,
            estimated: record.estimated,
            model_cost_nano_usd: record.model_cost_nano_usd,
            embedding_cost_nano_usd: record.embedding_cost_nano_usd,
            rerank_model: record.rerank_model,
            rerank_cost_nano_usd: record.rerank_cost_nano_usd,
            unreported_cost_nano_usd: record.unreported_cost_nano_usd,
            cost_nano_usd: record.cost_nano_usd,
            documents: record.documents,
            chunks: record.chunks,
            subject: record.subject,
            injection: record.injection,
            keys: record.keys,
            changed: record.changed,
            latency_ms: record.latency_ms,
            receipt: record.receipt,
        }
    }
}

impl From<WireRecord> for Record {
    fn from(wire: WireRecord) -> Self {
        Self {
            tenant_id: wire.tenant_id,
            ticket: wire.ticket,
            time: wire.time,
            day: wire.day,
            month: wire.month,
            user_id: wire.user_id,
            key_id: wire.key_id,
            operator: wire.operator,
            request_id: wire.request_id,
            action: wire.action,
            outcome: wire.outcome,
            error: wire.error,
            limit: wire.limit,
            count: wire.count,
            model: wire.model,
            usage: Usage {
                input_tokens: wire.input_tokens,
                output_tokens: wire.output_tokens,
                cache_read_input_tokens: wire.cache_read_input_tokens,
                cache_creation_input_tokens: wire.cache_creation_input_tokens,
            },
            model_cost_nano_usd: wire.model_cost_nano_usd,
            embedding_model: wire.embedding_model,
            embedding_tokens: wire.embedding_tokens,
            embedding_cost_nano_usd: wire.embedding_cost_nano_usd,
            rerank_model: wire.rerank_model,
            rerank_cost_nano_usd: wire.rerank_cost_nano_usd,
            unreported_tokens: wire.unreported_tokens,
            unreported_cost_nano_usd: wire.unreported_cost_nano_usd,
            cost_nano_usd: wire.cost_nano_usd,
            estimated: wire.estimated,
            documents: wire.documents,
            chunks: wire.chunks,
            subject: wire.subject,
            injection: wire.injection,
            keys: wire.keys,
            changed: wire.changed,
            latency_ms: wire.latency_ms,
            receipt: wire.receipt,
        }
    }
}

/// An object of the log, ready to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its key.
    pub key: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The chain once it is in it.
    pub head: Head,
}

/// Why an object cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// It is not gzip, is cut off or fails its checksum.
    #[error("it cannot be unpacked: {0}")]
    Gzip(#[from] std::io::Error),
    /// A line is no line of this log.
    #[error("line {line} is none of this log: {problem}")]
    Line {
        /// Which, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// It holds nothing.
    #[error("it holds no lines")]
    Empty,
}

/// Makes the object that follows `head` out of records, which must not be none, and which the store is
/// to keep until `retain_until`. It is filed under the day of its first record.
///
/// # Errors
/// If a record does not serialise, which a test rules out.
pub fn object(head: &Head, records: Vec<WireRecord>, retain_until: Timestamp) -> std::io::Result<Object> {
    let number = head.objects + 1;
    let first = head.lines + 1;
    let key = records.first().map(|record| key(&record.tenant_id, record.time, first)).unwrap_or_default();
    let mut zip = GzEncoder::new(Vec::new(), Compression::new(6));
    let mut lines = head.lines;
    for record in records {
        lines += 1;
        let previous = head.last.clone();
        let line = Line { position: lines, object: number, previous, retain_until, record };
        serde_json::to_writer(&mut zip, &line)?;
        // JSON escapes line breaks, so a line is a line whatever a user is called.
        zip.write_all(b"\n")?;
    }
    let bytes = zip.finish()?;
    let head = Head { objects: number, lines, last: ObjectHash::of(&bytes) };
    Ok(Object { key, bytes, head })
}

/// The key of the object whose first line is at `position`.
pub fn key(tenant: &TenantId, first: Timestamp, position: u64) -> String {
    let day = day_prefix(tenant, first);
    format!("{day}{position:012}.ndjson.gz")
}

/// What all of a tenant's keys begin with.
pub fn tenant_prefix(tenant: &TenantId) -> String {
    format!("tenant={tenant}/")
}

/// What the keys of a tenant's objects of a day begin with.
pub fn day_prefix(tenant: &TenantId, at: Timestamp) -> String {
    let day = at.to_datetime();
    let prefix = tenant_prefix(tenant);
    format!("{prefix}year={:04}/month={:02}/day={:02}/", day.year(), u8::from(day.month()), day.day())
}

/// Reads an object line by line, in the memory of one line.
pub fn lines(object: impl Read) -> impl Iterator<Item = Result<Line, Unreadable>> {
    raw_lines(object).enumerate().map(|(n, text)| {
        let line = |problem: String| Unreadable::Line { line: n + 1, problem };
        serde_json::from_str(&text?).map_err(|e| line(e.to_string()))
    })
}

/// The lines of an object as text.
pub fn raw_lines(object: impl Read) -> impl Iterator<Item = Result<String, Unreadable>> {
    let mut reader = BufReader::new(MultiGzDecoder::new(object));
    std::iter::from_fn(move || {
        let mut text = String::new();
        match reader.by_ref().take(MOST_LINE_BYTES).read_line(&mut text) {
            Ok(0) => None,
            Ok(_) => Some(Ok(text)),
            Err(error) => Some(Err(Unreadable::Gzip(error))),
        }
    })
}

/// What of an object matters to the chain: what it was made to follow, and where it leads.
///
/// # Errors
/// [`Unreadable`]
pub fn read(bytes: &[u8]) -> Result<(Vec<Line>, Head), Unreadable> {
    let lines = lines(bytes).collect::<Result<Vec<_>, _>>()?;
    let last = lines.last().ok_or(Unreadable::Empty)?;
    let head = Head { objects: last.object, lines: last.position, last: ObjectHash::of(bytes) };
    Ok((lines, head))
}

mod as_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &impl Display, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, D, T>(deserializer: D) -> Result<T, D::Error>
    where
        D: Deserializer<'de>,
        T: FromStr<Err: Display>,
    {
        T::from_str(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meter::Lease;

    const UNTIL: Timestamp = Timestamp::from_millis(2_000_000_000_000);

    fn record(ticket: u64) -> WireRecord {
        let lease: Lease = format!("c.1795000000.130.5000.70000.r-{ticket}").parse().unwrap();
        let now = Timestamp::parse("2026-11-18T10:00:00.123Z").unwrap();
        let mut record = Record::aborted("acme".parse().unwrap(), &lease, Ticket(ticket), now);
        record.user_id = Some("O'Brien \"quoted\"\nsecond line \u{2028} ü".parse().unwrap());
        record.chunks = vec!["doc:0".into()];
        WireRecord::new(format!("TICKET#{ticket:012}"), record)
    }

    #[test]
    fn objects_follow_one_another_and_read_back() {
        let one = object(&Head::default(), vec![record(1), record(2)], UNTIL).unwrap();
        assert_eq!(one.key, "tenant=acme/year=2026/month=11/day=18/000000000001.ndjson.gz");
        let two = object(&one.head, vec![record(3)], UNTIL).unwrap();
        assert_eq!(two.key, "tenant=acme/year=2026/month=11/day=18/000000000003.ndjson.gz");
        let (lines, head) = read(&two.bytes).unwrap();
        assert_eq!(head, two.head);
        assert_eq!((lines[0].position, lines[0].object, lines[0].retain_until), (3, 2, UNTIL));
        assert_eq!((&lines[0].previous, &lines[0].record), (&one.head.last, &record(3)));
        assert_eq!(raw_lines(one.bytes.as_slice()).count(), 2, "a user's line break is none of the log's");
    }

    #[test]
    fn nothing_of_a_record_is_lost() {
        let record = Record::from(record(7));
        assert_eq!(Record::from(WireRecord::new("x".into(), record.clone())), record);
    }

    #[test]
    fn damage_is_told() {
        let whole = object(&Head::default(), vec![record(1), record(2)], UNTIL).unwrap().bytes;
        let cut = whole.get(..whole.len() - 9).unwrap();
        assert!(matches!(read(cut), Err(Unreadable::Gzip(_))));
        assert!(matches!(read(b"{}"), Err(Unreadable::Gzip(_))));
        let mut zip = GzEncoder::new(Vec::new(), Compression::fast());
        zip.write_all(b"{\"position\":1}\n").unwrap();
        assert!(matches!(read(&zip.finish().unwrap()), Err(Unreadable::Line { line: 1, .. })));
        let nothing = GzEncoder::new(Vec::new(), Compression::fast()).finish().unwrap();
        assert!(matches!(read(&nothing), Err(Unreadable::Empty)));
    }
}

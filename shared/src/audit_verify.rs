//! Is a tenant's audit log complete and unaltered? From its objects alone. Pure.
//!
//! A [`Verifier`] is fed a tenant's objects in the order of the positions they are named after, and
//! then the file that says where the chain ends. It holds one line at a time and what it has to know of
//! the past, never a log: a log of any length is verified in the same memory.
//!
//! Each object but the last is vouched for by the one after it, and the last by the head. What nothing
//! in the log vouches for is the head itself: whoever can put an older one back, or write all of a chain
//! anew, leaves a log without a fault. Against that, an [`Anchor`] taken from an earlier run shows that
//! the log seen now continues the log seen then.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::str::FromStr;

use sha2::{Digest, Sha256};

use crate::audit_log::{self, HEAD, Head, Line, ObjectHash, Unreadable};
use crate::clock::Timestamp;
use crate::meter::Ticket;
use crate::one_line::OneLine;
use crate::tenant::TenantId;

/// How long after a higher ticket's record a lower one's may come: far longer than a request can last
/// and its lease can lie uncollected. A ticket without a record is `open` so long, and missing then.
const IN_FLIGHT_MS: u64 = 30 * 60 * 1_000;
/// The retention that is required by default: seven years, of which two have a leap day.
pub const RETENTION_DAYS: u32 = 2_557;
/// A retention date may be reckoned from the hour or the day of a record rather than its instant.
const RETENTION_SLACK_MS: i64 = 86_400_000;
/// Within how many records without a ticket two of one id are noticed. What is written twice is
/// written by an exporter that is told something again, which is soon; and a copy of an old record
/// that is put into a log breaks its chain. To notice any pair would take memory for every id.
const IDS_REMEMBERED: usize = 100_000;
const HOUR_MS: i64 = 3_600_000;

/// What a tenant's log was at the end of an earlier run: `<tenant>:<objects>:<hash of the last>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Anchor {
    /// The tenant.
    pub tenant: TenantId,
    /// Objects in its chain.
    pub objects: u64,
    /// The hash of the last of them.
    pub last: ObjectHash,
}

/// A text that is no anchor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an earlier state is written <tenant>:<objects>:<hash>, as a verification prints it")]
pub struct InvalidAnchor;

impl FromStr for Anchor {
    type Err = InvalidAnchor;

    fn from_str(text: &str) -> Result<Self, InvalidAnchor> {
        let mut parts = text.splitn(3, ':');
        let mut part = || parts.next().ok_or(InvalidAnchor);
        Ok(Self {
            tenant: part()?.parse().map_err(|_| InvalidAnchor)?,
            objects: part()?.parse().map_err(|_| InvalidAnchor)?,
            last: part()?.to_owned().try_into().map_err(|_| InvalidAnchor)?,
        })
    }
}

impl fmt::Display for Anchor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.tenant, self.objects, self.last)
    }
}

/// What the store itself says of how long it keeps an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It was not asked: there are files alone.
    Unknown,
    /// It may be changed or removed at any time, or by some.
    Unlocked,
    /// It can be changed or removed by nobody until then.
    Until(Timestamp),
}

/// What a log is held to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// For how many days after its last record an object must be kept.
    pub retention_days: u32,
    /// What the log was earlier.
    pub since: Option<Anchor>,
}

impl Default for Rules {
    fn default() -> Self {
        Self { retention_days: RETENTION_DAYS, since: None }
    }
}

/// Something that is wrong, and where. Shown as one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The key of the object, or the tenant's prefix.
    pub place: String,
    /// The place in the chain of the line, where it is one that is wrong.
    pub position: Option<u64>,
    /// What is wrong.
    pub fault: Fault,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", OneLine(&self.place))?;
        if let Some(position) = self.position {
            write!(f, ", line {position} of the log")?;
        }
        write!(f, ": {}", self.fault)
    }
}

/// What can be wrong with a log.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields of a fault are what its text says")]
pub enum Fault {
    /// An object is not gzip, is cut off, fails its checksum, or holds something else than lines.
    Unreadable(String),
    /// A file that does not belong there.
    Stray,
    /// An object's name is not the one of its content.
    Misnamed { expected: String },
    /// A record of another tenant.
    Foreign { tenant: TenantId },
    /// Records of more than one hour in an object.
    Hours { first: Timestamp, found: Timestamp },
    /// Objects are missing before this one, and so is what they would tell of `last`, the one before them.
    ObjectsMissing { first: u64, before: u64, position: u64, last: Option<String> },
    /// An object's number is not the next, but an earlier one.
    ObjectAgain { expected: u64, found: u64 },
    /// Two lines of an object do not agree on its number, or on the hash of the object before.
    Torn,
    /// Positions are missing before this one.
    PositionsMissing { expected: u64, found: u64 },
    /// A position comes again, or after a higher one.
    PositionAgain { expected: u64, found: u64 },
    /// The object is not the one that the next one was written after.
    Altered { hash: ObjectHash, named: ObjectHash, by: String },
    /// The next object, whose word it is whether this one is as it was, is damaged itself.
    Unvouched { by: String },
    /// The first object of a chain names one before it.
    NotFirst,
    /// Two lines of an object do not agree on how long it is kept.
    RetentionTorn { first: Timestamp, found: Timestamp },
    /// An object is not kept for long enough.
    RetentionShort { until: Timestamp, required: Timestamp },
    /// The store keeps the object for less long than it says.
    RetentionUnkept { until: Timestamp, kept: Timestamp },
    /// The store does not keep the object from being changed or removed.
    Unlocked,
    /// A record is there twice.
    RecordAgain { id: String },
    /// A ticket is accounted for twice.
    TicketAgain { ticket: Ticket },
    /// Tickets are not accounted for, though a higher one was, long ago.
    TicketsMissing { first: u64, last: u64, passed: Timestamp },
    /// A record's total is not the sum of its parts.
    Total { parts: u128, total: u64 },
    /// Nothing says where the chain ends.
    HeadMissing,
    /// What says where the chain ends cannot be read.
    HeadUnreadable(String),
    /// The chain ends before its head says.
    EndsEarly { head: Head, found: Head, last: Option<String> },
    /// The chain goes on after the end that its head names.
    GoesOn { head: Head, found: Head },
    /// The last object is not the one that the head names.
    LastAltered { hash: ObjectHash, named: ObjectHash },
    /// The log is not the one of the earlier run: it is shorter.
    Shorter { since: Anchor, objects: u64 },
    /// The log is not the one of the earlier run: it was written anew.
    Rewritten { since: Anchor, hash: ObjectHash },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(why) => write!(f, "it cannot be read: {}", OneLine(why)),
            Self::Stray => write!(f, "this is no file of the log"),
            Self::Misnamed { expected } => {
                write!(f, "the name does not fit the content, which belongs under {expected}")
            }
            Self::Foreign { tenant } => write!(f, "it holds a record of another tenant, {tenant}"),
            Self::Hours { first, found } => {
                write!(f, "it holds records of more than one hour: {first} and {found}")
            }
            Self::ObjectsMissing { first, before, position, last } => {
                let missing = Range("object", *first, before.saturating_sub(1));
                write!(f, "{missing} missing before it, from …/{} on{}", file_name(*position), Untold(last))
            }
            Self::ObjectAgain { expected, found } => {
                write!(f, "it is object {found} of the chain, where object {expected} should be")
            }
            Self::Torn => write!(f, "the lines of the object disagree on its place in the chain"),
            Self::PositionsMissing { expected, found } => {
                write!(f, "{} missing before it", Range("line", *expected, found.saturating_sub(1)))
            }
            Self::PositionAgain { expected, found } => {
                write!(f, "line {found} stands where line {expected} should be")
            }
            Self::Altered { hash, named, by } => write!(
                f,
                "it was changed or replaced: its hash is {hash}, but {} follows {named}",
                OneLine(by)
            ),
            Self::Unvouched { by } => {
                write!(
                    f,
                    "nothing tells whether it is as it was: {}, which follows it, is damaged",
                    OneLine(by)
                )
            }
            Self::NotFirst => write!(f, "it is the first object, but names one before it"),
            Self::RetentionTorn { first, found } => {
                write!(f, "the lines of the object disagree on how long it is kept: {first} and {found}")
            }
            Self::RetentionShort { until, required } => {
                write!(f, "it is kept until {until} only, and {required} is required")
            }
            Self::RetentionUnkept { until, kept } => {
                write!(f, "the store keeps it until {kept} only, and it says {until}")
            }
            Self::Unlocked => write!(f, "the store does not keep it from being changed or removed"),
            Self::RecordAgain { id } => write!(f, "record {} is there twice", OneLine(id)),
            Self::TicketAgain { ticket } => write!(f, "ticket {ticket} is accounted for twice"),
            Self::TicketsMissing { first, last, passed } => write!(
                f,
                "{} missing: no record accounts for what was admitted before {passed}",
                Range("ticket", *first, *last)
            ),
            Self::Total { parts, total } => {
                write!(f, "its total is {total} nano-dollars, and its parts add up to {parts}")
            }
            Self::HeadMissing => write!(f, "{HEAD} is missing, so nothing says where the log ends"),
            Self::HeadUnreadable(why) => {
                write!(f, "it cannot be read, so nothing says where the log ends: {}", OneLine(why))
            }
            Self::EndsEarly { head, found, last } => write!(
                f,
                "the log ends too early: its head names {} objects and {} lines, and {} objects and {} lines \
                 are there; missing is what comes from …/{} on{}",
                head.objects,
                head.lines,
                found.objects,
                found.lines,
                file_name(found.lines.saturating_add(1)),
                Untold(last)
            ),
            Self::GoesOn { head, found } => write!(
                f,
                "the log goes on after its end: its head names {} objects and {} lines, and {} objects and {} \
                 lines are there; from …/{} on (if they came while the log was copied, copy it again)",
                head.objects,
                head.lines,
                found.objects,
                found.lines,
                file_name(head.lines.saturating_add(1))
            ),
            Self::LastAltered { hash, named } => {
                write!(f, "it was changed or replaced: its hash is {hash}, but the head names {named}")
            }
            Self::Shorter { since, objects } => write!(
                f,
                "this is not the log of the earlier run: it had {} objects, and {objects} are there",
                since.objects
            ),
            Self::Rewritten { since, hash } => write!(
                f,
                "this is not the log of the earlier run: the hash of object {} was {}, and is {hash}",
                since.objects, since.last
            ),
        }
    }
}

/// One thing or several, and whether it is or they are.
struct Range(&'static str, u64, u64);

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(what, first, last) = self;
        if first == last {
            write!(f, "{what} {first} is")
        } else {
            write!(f, "{what}s {first} to {last} are")
        }
    }
}

/// That nothing vouches for an object, if there is one.
struct Untold<'a>(&'a Option<String>);

impl fmt::Display for Untold<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(key) => write!(f, "; so nothing tells whether {} is as it was", OneLine(key)),
            None => Ok(()),
        }
    }
}

/// The last part of the key of the object that begins at `position`.
fn file_name(position: u64) -> String {
    format!("{position:012}{SUFFIX}")
}

const SUFFIX: &str = ".ndjson.gz";

/// The position that an object's key names, or `None` if it is no object's key. Objects are verified in
/// this order, whatever their days.
pub fn position(key: &str) -> Option<u64> {
    let digits = key.rsplit('/').next()?.strip_suffix(SUFFIX)?;
    let plain = digits.len() >= 12 && digits.bytes().all(|b| b.is_ascii_digit());
    digits.parse().ok().filter(|position| plain && *position > 0)
}

/// The order in which a log's objects are verified, by their keys: that of their positions, across days. What
/// has none comes first.
pub fn in_order(a: &str, b: &str) -> Ordering {
    (position(a), a).cmp(&(position(b), b))
}

/// What a log holds, in a line. [`Summary::anchor`] is what a later run is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The tenant.
    pub tenant: TenantId,
    /// Where the objects that are there end.
    pub head: Head,
    /// The records that were read.
    pub records: u64,
    /// When the oldest of them was written.
    pub first: Option<Timestamp>,
    /// When the newest of them was written.
    pub last: Option<Timestamp>,
    /// The highest ticket.
    pub highest_ticket: u64,
    /// Lower tickets without a record, too young to be missing.
    pub open_tickets: u64,
    /// What is wrong.
    pub findings: u64,
}

impl Summary {
    /// What to hold a later run's log to.
    pub fn anchor(&self) -> Anchor {
        let Head { objects, last, .. } = self.head.clone();
        Anchor { tenant: self.tenant.clone(), objects, last }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tenant, head, records, highest_ticket, open_tickets, findings, .. } = self;
        match findings {
            0 => write!(f, "{tenant}: healthy")?,
            1 => write!(f, "{tenant}: 1 finding")?,
            _ => write!(f, "{tenant}: {findings} findings")?,
        }
        let plural = |n: u64| if n == 1 { "" } else { "s" };
        let objects = head.objects;
        write!(f, ", {objects} object{}, {records} record{}", plural(objects), plural(*records))?;
        if let (Some(first), Some(last)) = (self.first, self.last) {
            write!(f, " from {first} to {last}")?;
        }
        write!(f, ", tickets to {highest_ticket}, {open_tickets} of them open, head {}", self.anchor())
    }
}

/// How far the chain has been followed.
#[derive(Debug)]
struct Place {
    /// The last object's key.
    key: String,
    /// Where the chain is once it is in it. What an unreadable object would have said is guessed.
    head: Head,
    /// Whether all of it was read, so that the next position is known.
    whole: bool,
}

/// Which tickets have been accounted for. Its memory grows with the gaps alone.
#[derive(Debug, Default)]
struct Tickets {
    highest: u64,
    /// First of a gap to its last, and when it was first passed.
    gaps: BTreeMap<u64, (u64, Timestamp)>,
}

impl Tickets {
    /// Accounts for a ticket in a record written at `at`; `false` if it was accounted for before.
    fn take(&mut self, ticket: u64, at: Timestamp) -> bool {
        if ticket > self.highest {
            if ticket > self.highest + 1 {
                self.gaps.insert(self.highest + 1, (ticket - 1, at));
            }
            self.highest = ticket;
            return true;
        }
        let Some((&first, &(last, passed))) = self.gaps.range(..=ticket).next_back() else { return false };
        if last < ticket {
            return false;
        }
        self.gaps.remove(&first);
        if first < ticket {
            self.gaps.insert(first, (ticket - 1, passed));
        }
        if ticket < last {
            self.gaps.insert(ticket + 1, (last, passed));
        }
        true
    }
}

/// The ids of the latest records without a ticket, as hashes.
#[derive(Debug, Default)]
struct Ids {
    order: VecDeque<u64>,
    seen: HashSet<u64>,
}

impl Ids {
    /// Remembers an id; `false` if it is remembered already.
    fn take(&mut self, id: &str) -> bool {
        let mut hasher = DefaultHasher::new();
        id.hash(&mut hasher);
        let hash = hasher.finish();
        if !self.seen.insert(hash) {
            return false;
        }
        self.order.push_back(hash);
        if self.order.len() > IDS_REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.seen.remove(&oldest);
        }
        true
    }
}

/// Reads an object and hashes what is read; keeps the store's own failures apart from the object's.
struct Hashing<R> {
    inner: R,
    hash: Sha256,
    failure: Option<io::Error>,
}

impl<R: Read> Hashing<R> {
    fn new(inner: R) -> Self {
        Self { inner, hash: Sha256::new(), failure: None }
    }

    /// The hash of all of it, once what nobody read has been read.
    fn finish(mut self) -> io::Result<ObjectHash> {
        if self.failure.is_none() {
            io::copy(&mut self, &mut io::sink()).ok();
        }
        match self.failure {
            Some(failure) => Err(failure),
            None => ObjectHash::try_from(hex::encode(self.hash.finalize())).map_err(io::Error::other),
        }
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.inner.read(buffer) {
            Ok(n) => {
                self.hash.update(buffer.get(..n).unwrap_or_default());
                Ok(n)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                let shown = io::Error::new(error.kind(), error.to_string());
                self.failure = Some(error);
                Err(shown)
            }
        }
    }
}

/// What is told of each finding, as it is made.
pub type Report<'a> = &'a mut dyn FnMut(Finding);

/// Follows a tenant's chain.
#[derive(Debug)]
pub struct Verifier {
    tenant: TenantId,
    rules: Rules,
    place: Option<Place>,
    /// Whether the earlier run's last object has come by.
    anchored: bool,
    tickets: Tickets,
    ids: Ids,
    records: u64,
    first: Option<Timestamp>,
    last: Option<Timestamp>,
    findings: u64,
}

/// What the first line of an object says, to which its others are held.
struct Opening {
    object: u64,
    previous: ObjectHash,
    retain_until: Timestamp,
    time: Timestamp,
    latest: Timestamp,
    position: u64,
    /// Whether it does not follow the object before as that is now.
    altered: bool,
    torn: bool,
    retention_torn: bool,
    mixed: bool,
    foreign: bool,
}

impl Verifier {
    /// A verifier of that tenant's log.
    pub fn new(tenant: TenantId, rules: Rules) -> Self {
        let since = rules.since.as_ref().filter(|since| since.tenant == tenant && since.objects > 0);
        Self {
            anchored: since.is_none(),
            tenant,
            rules,
            place: None,
            tickets: Tickets::default(),
            ids: Ids::default(),
            records: 0,
            first: None,
            last: None,
            findings: 0,
        }
    }

    fn find(&mut self, report: Report<'_>, place: &str, position: Option<u64>, fault: Fault) {
        self.findings += 1;
        report(Finding { place: place.to_owned(), position, fault });
    }

    /// Verifies the next object. Objects come in the order of [`position`]; one whose key has none is
    /// found to be a stray.
    ///
    /// # Errors
    /// If `bytes` cannot be read for a reason that is not the object's.
    pub fn object(&mut self, key: &str, kept: Kept, bytes: impl Read, report: Report<'_>) -> io::Result<()> {
        let Some(named) = position(key) else {
            self.find(report, key, None, Fault::Stray);
            return Ok(());
        };
        let mut bytes = Hashing::new(bytes);
        let mut opening: Option<Opening> = None;
        let mut unreadable = None;
        for line in audit_log::lines(&mut bytes) {
            match line {
                Ok(line) => match &mut opening {
                    Some(opening) => self.further(key, opening, &line, report),
                    None => opening = Some(self.opening(key, kept, &line, report)),
                },
                Err(error) => {
                    unreadable = Some(error);
                    break;
                }
            }
        }
        let hash = bytes.finish()?;
        if opening.is_none() && unreadable.is_none() {
            unreadable = Some(Unreadable::Empty);
        }
        let whole = unreadable.is_none();
        if let Some(error) = unreadable {
            self.find(report, key, None, Fault::Unreadable(error.to_string()));
        }
        let before = self.place.as_ref().map(|place| place.head.clone()).unwrap_or_default();
        let accused = self.place.as_ref().map(|place| place.key.clone());
        if let Some(accused) = accused {
            let by = key.to_owned();
            match &opening {
                Some(opening) if whole && opening.altered => {
                    let (hash, named) = (before.last.clone(), opening.previous.clone());
                    self.find(report, &accused, None, Fault::Altered { hash, named, by });
                }
                // A damaged witness may say anything.
                Some(opening) if !whole && opening.altered => {
                    self.find(report, &accused, None, Fault::Unvouched { by });
                }
                None => self.find(report, &accused, None, Fault::Unvouched { by }),
                Some(_) => {}
            }
        }
        let (objects, lines) = match &opening {
            Some(opening) if whole => (opening.object, opening.position),
            _ => (before.objects.saturating_add(1), named.max(before.lines)),
        };
        if let Some(opening) = opening {
            self.retention(key, &opening, report);
        }
        self.anchor(key, objects, &hash, report);
        // One out of its place says nothing of how far the chain goes.
        if objects > before.objects {
            self.place =
                Some(Place { key: key.to_owned(), head: Head { objects, lines, last: hash }, whole });
        }
        Ok(())
    }

    /// The first line of an object: its name, and its place in the chain.
    fn opening(&mut self, key: &str, kept: Kept, line: &Line, report: Report<'_>) -> Opening {
        let at = Some(line.position);
        let expected = audit_log::key(&self.tenant, line.record.time, line.position);
        if key != expected {
            self.find(report, key, at, Fault::Misnamed { expected });
        }
        let (next_object, next_position, whole) = self.place.as_ref().map_or((1, 1, true), |place| {
            (place.head.objects.saturating_add(1), place.head.lines.saturating_add(1), place.whole)
        });
        let mut altered = false;
        if line.object > next_object {
            let last = self.place.as_ref().map(|place| place.key.clone());
            let fault = Fault::ObjectsMissing {
                first: next_object,
                before: line.object,
                position: next_position,
                last,
            };
            self.find(report, key, at, fault);
        } else if line.object < next_object {
            self.find(report, key, at, Fault::ObjectAgain { expected: next_object, found: line.object });
        } else if let Some(place) = &self.place {
            altered = line.previous != place.head.last;
        } else if line.previous != ObjectHash::none() {
            self.find(report, key, at, Fault::NotFirst);
        }
        // Where objects are missing, so are their lines; where one was not read, its lines were not.
        if line.position < next_position {
            let fault = Fault::PositionAgain { expected: next_position, found: line.position };
            self.find(report, key, at, fault);
        } else if line.position > next_position && whole && line.object <= next_object {
            let fault = Fault::PositionsMissing { expected: next_position, found: line.position };
            self.find(report, key, at, fault);
        }
        match kept {
            // The store may keep whole seconds.
            Kept::Until(kept) if kept.as_seconds() < line.retain_until.as_seconds() => {
                self.find(report, key, None, Fault::RetentionUnkept { until: line.retain_until, kept });
            }
            Kept::Unlocked => self.find(report, key, None, Fault::Unlocked),
            Kept::Unknown | Kept::Until(_) => {}
        }
        let mut opening = Opening {
            object: line.object,
            previous: line.previous.clone(),
            retain_until: line.retain_until,
            time: line.record.time,
            latest: line.record.time,
            position: line.position,
            altered,
            torn: false,
            retention_torn: false,
            mixed: false,
            foreign: false,
        };
        self.record(key, &mut opening, line, report);
        opening
    }

    /// A further line of an object.
    fn further(&mut self, key: &str, opening: &mut Opening, line: &Line, report: Report<'_>) {
        let at = Some(line.position);
        let expected = opening.position.saturating_add(1);
        let found = line.position;
        if found > expected {
            self.find(report, key, at, Fault::PositionsMissing { expected, found });
        } else if found < expected {
            self.find(report, key, at, Fault::PositionAgain { expected, found });
        }
        opening.position = opening.position.max(found);
        let torn = line.object != opening.object || line.previous != opening.previous;
        if torn && !std::mem::replace(&mut opening.torn, true) {
            self.find(report, key, at, Fault::Torn);
        }
        let (first, found) = (opening.retain_until, line.retain_until);
        if first != found && !std::mem::replace(&mut opening.retention_torn, true) {
            self.find(report, key, at, Fault::RetentionTorn { first, found });
        }
        self.record(key, opening, line, report);
    }

    /// The record in a line.
    fn record(&mut self, key: &str, opening: &mut Opening, line: &Line, report: Report<'_>) {
        let (at, record) = (Some(line.position), &line.record);
        let time = record.time;
        self.records += 1;
        self.first = Some(self.first.map_or(time, |first| first.min(time)));
        self.last = Some(self.last.map_or(time, |last| last.max(time)));
        opening.latest = opening.latest.max(time);
        let hour = |at: Timestamp| at.as_millis().div_euclid(HOUR_MS);
        if hour(time) != hour(opening.time) && !std::mem::replace(&mut opening.mixed, true) {
            self.find(report, key, at, Fault::Hours { first: opening.time, found: time });
        }
        let parts = [
            record.model_cost_nano_usd,
            record.embedding_cost_nano_usd,
            record.rerank_cost_nano_usd,
            record.unreported_cost_nano_usd,
        ];
        let parts: u128 = parts.iter().map(|part| u128::from(part.0)).sum();
        let total = record.cost_nano_usd.0;
        if parts != u128::from(total) {
            self.find(report, key, at, Fault::Total { parts, total });
        }
        if record.tenant_id != self.tenant {
            // Its tickets and ids are numbers of another's.
            if !std::mem::replace(&mut opening.foreign, true) {
                self.find(report, key, at, Fault::Foreign { tenant: record.tenant_id.clone() });
            }
            return;
        }
        match record.ticket {
            Some(ticket) if !self.tickets.take(ticket.0, time) => {
                self.find(report, key, at, Fault::TicketAgain { ticket });
            }
            None if !self.ids.take(&record.id) => {
                self.find(report, key, at, Fault::RecordAgain { id: record.id.clone() });
            }
            Some(_) | None => {}
        }
    }

    fn retention(&mut self, key: &str, opening: &Opening, report: Report<'_>) {
        let required = opening.latest.plus_days(self.rules.retention_days);
        let until = opening.retain_until;
        if until < required.plus_millis(-RETENTION_SLACK_MS) {
            self.find(report, key, None, Fault::RetentionShort { until, required });
        }
    }

    /// Holds the object that was the last in an earlier run to what it was.
    fn anchor(&mut self, key: &str, object: u64, hash: &ObjectHash, report: Report<'_>) {
        if self.anchored {
            return;
        }
        if let Some(since) = self.rules.since.clone().filter(|since| since.objects == object) {
            self.anchored = true;
            if since.last != *hash {
                self.find(report, key, None, Fault::Rewritten { since, hash: hash.clone() });
            }
        }
    }

    /// Verifies the end, given what [`HEAD`] holds, if it is there, and sums up.
    pub fn finish(mut self, head: Option<&[u8]>, report: Report<'_>) -> Summary {
        let prefix = audit_log::tenant_prefix(&self.tenant);
        self.end(&prefix, head, report);
        let mut open_tickets = 0_u64;
        for (first, (last, passed)) in std::mem::take(&mut self.tickets.gaps) {
            if self.last.is_some_and(|newest| newest.millis_since(passed) > IN_FLIGHT_MS) {
                self.find(report, &prefix, None, Fault::TicketsMissing { first, last, passed });
            } else {
                open_tickets = open_tickets.saturating_add(last - first + 1);
            }
        }
        Summary {
            tenant: self.tenant,
            head: self.place.map(|place| place.head).unwrap_or_default(),
            records: self.records,
            first: self.first,
            last: self.last,
            highest_ticket: self.tickets.highest,
            open_tickets,
            findings: self.findings,
        }
    }

    fn end(&mut self, prefix: &str, head: Option<&[u8]>, report: Report<'_>) {
        let (found, key, whole) = match &self.place {
            Some(place) => (place.head.clone(), place.key.clone(), place.whole),
            None => (Head::default(), String::new(), true),
        };
        match head.map(serde_json::from_slice::<Head>) {
            None if self.place.is_none() => {}
            None => self.find(report, prefix, None, Fault::HeadMissing),
            Some(Err(error)) => {
                self.find(report, &format!("{prefix}{HEAD}"), None, Fault::HeadUnreadable(error.to_string()));
            }
            Some(Ok(head)) => {
                // Of an object that was not read to its end, the last line is not known.
                let lines = |f: fn(&u64, &u64) -> bool| whole && f(&found.lines, &head.lines);
                let last = self.place.as_ref().map(|place| place.key.clone());
                if found.objects < head.objects || (found.objects == head.objects && lines(u64::lt)) {
                    self.find(report, prefix, None, Fault::EndsEarly { head, found, last });
                } else if found.objects > head.objects || lines(u64::gt) {
                    self.find(report, prefix, None, Fault::GoesOn { head, found });
                } else if found.last != head.last {
                    let (hash, named) = (found.last, head.last);
                    self.find(report, &key, None, Fault::LastAltered { hash, named });
                }
            }
        }
        if !self.anchored
            && let Some(since) = self.rules.since.clone()
        {
            let objects = self.place.as_ref().map_or(0, |place| place.head.objects);
            self.find(report, prefix, None, Fault::Shorter { since, objects });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit_log::{Object, WireRecord, object, read};
    use crate::item_key;
    use crate::ledger::{Asked, Denial, Record};
    use crate::meter::{Lease, Limit};
    use crate::units::NanoUsd;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;
    use std::io::Write;

    /// 2026-11-18, 22 o'clock: logs of some hours cross a day.
    const START: i64 = 1_795_039_200_000;
    /// Records in each object of [`log`].
    const EACH: u64 = 3;

    fn tenant() -> TenantId {
        "acme".parse().unwrap()
    }

    fn record(ticket: u64, at: Timestamp) -> WireRecord {
        let lease: Lease = format!("c.1795000000.130.5000.70000.r-{ticket}").parse().unwrap();
        let ticket = Ticket(ticket);
        WireRecord::new(item_key::ticket(ticket), Record::aborted(tenant(), &lease, ticket, at))
    }

    fn event(tail: &str, at: Timestamp) -> WireRecord {
        let asked = Asked { request_id: "r".to_owned().into(), key_id: None, user_id: None };
        let record = Record::denied(tenant(), Denial::Limit(Limit::Requests), 9, at, asked);
        WireRecord::new(item_key::event(at, tail), record)
    }

    fn hour(n: u64) -> Timestamp {
        Timestamp::from_millis(START + i64::try_from(n).unwrap() * HOUR_MS)
    }

    fn until(at: Timestamp) -> Timestamp {
        at.plus_days(RETENTION_DAYS)
    }

    /// A log of so many objects, one for each hour.
    fn log(objects: u64) -> Vec<Object> {
        let each = |n: u64| {
            let at = |i: u64| hour(n).plus_millis(i64::try_from(i).unwrap() * 1_000);
            (0..EACH).map(|i| record(n * EACH + i + 1, at(i))).collect::<Vec<_>>()
        };
        chain((0..objects).map(each).collect())
    }

    fn chain(contents: Vec<Vec<WireRecord>>) -> Vec<Object> {
        let mut head = Head::default();
        let mut objects = Vec::new();
        for records in contents {
            let kept = until(records.last().unwrap().time);
            let made = object(&head, records, kept).unwrap();
            head = made.head.clone();
            objects.push(made);
        }
        objects
    }

    fn pack(lines: &[Line]) -> Vec<u8> {
        let mut zip = GzEncoder::new(Vec::new(), Compression::fast());
        for line in lines {
            serde_json::to_writer(&mut zip, line).unwrap();
            zip.write_all(b"\n").unwrap();
        }
        zip.finish().unwrap()
    }

    fn verify_with(rules: Rules, kept: Kept, log: &[Object], head: Option<&Head>) -> (Vec<Finding>, Summary) {
        let mut objects: Vec<&Object> = log.iter().collect();
        objects.sort_by_key(|object| position(&object.key));
        let mut found = Vec::new();
        let mut verifier = Verifier::new(tenant(), rules);
        for object in objects {
            verifier
                .object(&object.key, kept, object.bytes.as_slice(), &mut |finding| found.push(finding))
                .unwrap();
        }
        let head = head.map(|head| serde_json::to_vec(head).unwrap());
        let summary = verifier.finish(head.as_deref(), &mut |finding| found.push(finding));
        assert_eq!(summary.findings, found.len() as u64);
        (found, summary)
    }

    fn verify(log: &[Object], head: &Head) -> Vec<Finding> {
        verify_with(Rules::default(), Kept::Unknown, log, Some(head)).0
    }

    fn faults(log: &[Object]) -> Vec<Fault> {
        let head = log.last().map(|object| object.head.clone()).unwrap();
        verify(log, &head).into_iter().map(|finding| finding.fault).collect()
    }

    fn names(found: &[Finding], key: &str) -> bool {
        let file = key.rsplit('/').next().unwrap();
        found.iter().any(|finding| finding.to_string().contains(file))
    }

    #[test]
    fn a_healthy_log_has_no_fault() {
        let log = log(5);
        let head = &log[4].head;
        let (found, summary) = verify_with(Rules::default(), Kept::Until(until(hour(9))), &log, Some(head));
        assert_eq!(found, []);
        assert_eq!((summary.head.clone(), summary.records, summary.highest_ticket), (head.clone(), 15, 15));
        let text = format!(
            "acme: healthy, 5 objects, 15 records from 2026-11-18T22:00:00.000Z to 2026-11-19T02:00:02.000Z, \
             tickets to 15, 0 of them open, head acme:5:{}",
            head.last
        );
        assert_eq!(summary.to_string(), text);
        assert_eq!(verify(&[], &Head::default()), [], "nor has one that has not begun");
        assert_eq!(verify_with(Rules::default(), Kept::Unknown, &[], None).0, []);
    }

    proptest! {
        #[test]
        fn any_byte_changed_is_found(n in 0usize..4, at in any::<prop::sample::Index>(), mask in 1u8..) {
            let mut log = log(4);
            let head = log[3].head.clone();
            let at = at.index(log[n].bytes.len());
            log[n].bytes[at] ^= mask;
            let found = verify(&log, &head);
            prop_assert!(found.iter().any(|finding| finding.place == log[n].key), "{found:?}");
            prop_assert!(found.iter().all(|finding| !matches!(finding.fault, Fault::Altered { .. })
                || finding.place == log[n].key), "none else is accused of it: {found:?}");
        }

        #[test]
        fn any_object_cut_short_is_found(n in 0usize..4, at in any::<prop::sample::Index>()) {
            let mut log = log(4);
            let head = log[3].head.clone();
            let at = at.index(log[n].bytes.len());
            log[n].bytes.truncate(at);
            let found = verify(&log, &head);
            prop_assert!(found.iter().any(|finding| finding.place == log[n].key
                && matches!(finding.fault, Fault::Unreadable(_))), "{found:?}");
        }

        #[test]
        fn tickets_are_told_apart_in_any_order(order in Just((1u64..200).collect::<Vec<_>>()).prop_shuffle(),
            kept in 1usize..199) {
            let mut tickets = Tickets::default();
            let at = Timestamp::from_millis(0);
            let mut seen = std::collections::BTreeSet::new();
            for ticket in order.iter().take(kept).chain(order.iter().take(kept / 2)) {
                prop_assert_eq!(tickets.take(*ticket, at), seen.insert(*ticket));
            }
            let missing: Vec<u64> = tickets.gaps.iter().flat_map(|(first, (last, _))| *first..=*last).collect();
            let highest = *seen.last().unwrap();
            prop_assert_eq!(missing, (1..highest).filter(|t| !seen.contains(t)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn any_object_missing_is_named() {
        for n in 0..4 {
            let mut log = log(4);
            let head = log[3].head.clone();
            let gone = log.remove(n);
            let found = verify(&log, &head);
            assert!(names(&found, &gone.key), "{found:?}");
        }
        let log = log(4);
        let found = verify(&[], &log[3].head);
        assert!(matches!(found.as_slice(), [Finding { fault: Fault::EndsEarly { .. }, .. }]), "{found:?}");
        let gap = [log[0].clone(), log[1].clone(), log[3].clone()];
        let found = verify(&gap, &log[3].head);
        assert!(names(&found, &log[1].key), "what nothing vouches for is told: {found:?}");
        let found = verify_with(Rules::default(), Kept::Unknown, &log, None).0;
        assert!(matches!(found.as_slice(), [Finding { fault: Fault::HeadMissing, .. }]), "{found:?}");
    }

    #[test]
    fn any_two_objects_swapped_are_named() {
        for n in 0..4 {
            for other in 0..n {
                let mut log = log(4);
                let head = log[3].head.clone();
                let (one, two) = (log[n].bytes.clone(), log[other].bytes.clone());
                (log[n].bytes, log[other].bytes) = (two, one);
                let found = verify(&log, &head);
                for key in [&log[n].key, &log[other].key] {
                    assert!(found.iter().any(|finding| finding.place == *key), "{found:?}");
                }
            }
        }
    }

    #[test]
    fn an_object_renamed_or_copied_is_named() {
        let mut renamed = log(4);
        let head = renamed[3].head.clone();
        renamed[2].key = "tenant=acme/year=2026/month=11/day=20/000000000007.ndjson.gz".into();
        let found = verify(&renamed, &head);
        assert!(matches!(found.as_slice(), [Finding { fault: Fault::Misnamed { .. }, .. }]), "{found:?}");
        let mut copied = log(4);
        let key = "tenant=acme/year=2026/month=11/day=20/000000000008.ndjson.gz".to_owned();
        copied.push(Object { key: key.clone(), ..copied[0].clone() });
        let found = verify(&copied, &head);
        assert!(
            found.iter().any(|finding| finding.place == key
                && matches!(finding.fault, Fault::ObjectAgain { expected: 4, found: 1 })),
            "{found:?}"
        );
        assert!(found.iter().all(|finding| finding.place == key), "the others are as they were: {found:?}");
        let mut stray = log(4);
        stray.push(Object { key: "tenant=acme/x.gz".into(), ..stray[0].clone() });
        assert!(matches!(verify(&stray, &head).as_slice(), [Finding { fault: Fault::Stray, .. }]));
    }

    /// The log with a record of its `n`th object forged, that object made anew, and nothing else.
    fn forged(n: usize) -> Vec<Object> {
        let mut log = log(4);
        let (lines, _) = read(&log[n].bytes).unwrap();
        let before = n.checked_sub(1).map(|n| log[n].head.clone()).unwrap_or_default();
        let kept = lines[0].retain_until;
        let mut records: Vec<WireRecord> = lines.into_iter().map(|line| line.record).collect();
        records[1].user_id = Some("somebody else".parse().unwrap());
        log[n] = object(&before, records, kept).unwrap();
        log
    }

    #[test]
    fn a_record_forged_with_its_object_made_anew_is_found() {
        for n in 0..4 {
            let log_before = log(4);
            let found = verify(&forged(n), &log_before[3].head);
            let fault = found.iter().find(|finding| finding.place == log_before[n].key).map(|f| &f.fault);
            let by_next = matches!(fault, Some(Fault::Altered { .. }));
            let by_head = matches!(fault, Some(Fault::LastAltered { .. }));
            assert!(found.len() == 1 && (if n < 3 { by_next } else { by_head }), "{found:?}");
        }
    }

    #[test]
    fn what_only_an_earlier_run_can_tell() {
        let before = log(4);
        let (_, summary) = verify_with(Rules::default(), Kept::Unknown, &before, Some(&before[3].head));
        let since = summary.anchor();
        assert_eq!(since.to_string().parse(), Ok(since.clone()));
        let check = |log: &[Object], since: Option<Anchor>| {
            let head = log.last().unwrap().head.clone();
            let rules = Rules { since, ..Rules::default() };
            verify_with(rules, Kept::Unknown, log, Some(&head)).0
        };
        // The newest object dropped, and an older head put back: without a fault in itself.
        let shorter = log(3);
        assert_eq!(check(&shorter, None), []);
        let found = check(&shorter, Some(since.clone()));
        assert!(matches!(found.as_slice(), [Finding { fault: Fault::Shorter { .. }, .. }]), "{found:?}");
        // All of the chain and its head written anew.
        let mut contents: Vec<Vec<WireRecord>> = log(5)
            .iter()
            .map(|o| read(&o.bytes).unwrap().0.into_iter().map(|l| l.record).collect())
            .collect();
        contents[0][0].user_id = Some("somebody else".parse().unwrap());
        let rewritten = chain(contents);
        assert_eq!(check(&rewritten, None), []);
        let found = check(&rewritten, Some(since.clone()));
        assert!(matches!(found.as_slice(), [Finding { fault: Fault::Rewritten { .. }, .. }]), "{found:?}");
        assert_eq!(found[0].place, before[3].key);
        // The log that went on is the one of then.
        assert_eq!(check(&log(5), Some(since.clone())), []);
        assert_eq!(check(&before, Some(since)), []);
    }

    #[test]
    fn tickets_without_a_record_are_open_for_a_while_and_missing_then() {
        let start = hour(0);
        let check = |late: u64| {
            let at = |minutes: u64| start.plus_millis(i64::try_from(minutes).unwrap() * 60_000);
            let log = chain(vec![vec![record(1, at(0)), record(4, at(1)), record(5, at(late))]]);
            verify_with(Rules::default(), Kept::Unknown, &log, Some(&log[0].head))
        };
        let (found, summary) = check(31);
        assert_eq!((found.as_slice(), summary.open_tickets), ([].as_slice(), 2));
        let (found, summary) = check(32);
        assert_eq!(summary.open_tickets, 0);
        assert_eq!(
            found[0].to_string(),
            "tenant=acme/: tickets 2 to 3 are missing: no record accounts for what was admitted before \
             2026-11-18T22:01:00.000Z"
        );
        let again = chain(vec![vec![record(1, start)], vec![record(1, start)]]);
        assert_eq!(faults(&again), [Fault::TicketAgain { ticket: Ticket(1) }]);
    }

    #[test]
    fn an_event_written_twice_is_found() {
        let log = chain(vec![vec![event("a", hour(0)), event("b", hour(0))], vec![event("a", hour(0))]]);
        assert!(matches!(faults(&log).as_slice(), [Fault::RecordAgain { .. }]));
        let mut ids = Ids::default();
        for n in 0..=IDS_REMEMBERED {
            assert!(ids.take(&n.to_string()));
        }
        assert!(ids.take("0"), "the oldest is forgotten");
        assert_eq!((ids.order.len(), ids.seen.len()), (IDS_REMEMBERED, IDS_REMEMBERED));
    }

    #[test]
    fn what_a_record_says_is_checked() {
        let mut wrong = record(1, hour(0));
        wrong.cost_nano_usd = NanoUsd(1);
        assert_eq!(faults(&chain(vec![vec![wrong]])), [Fault::Total { parts: 70_000, total: 1 }]);
        let mut huge = record(1, hour(0));
        (huge.model_cost_nano_usd, huge.embedding_cost_nano_usd) = (NanoUsd(u64::MAX), NanoUsd(u64::MAX));
        assert!(matches!(faults(&chain(vec![vec![huge]])).as_slice(), [Fault::Total { .. }]));
        let mut foreign = record(2, hour(0));
        foreign.tenant_id = "other".parse().unwrap();
        let found = faults(&chain(vec![vec![record(1, hour(0)), foreign]]));
        assert_eq!(found, [Fault::Foreign { tenant: "other".parse().unwrap() }]);
        let hours = chain(vec![vec![record(1, hour(0)), record(2, hour(1))]]);
        assert_eq!(faults(&hours), [Fault::Hours { first: hour(0), found: hour(1) }]);
    }

    #[test]
    fn the_lines_of_an_object_must_agree() {
        let check = |change: fn(&mut Vec<Line>)| {
            let mut log = log(1);
            let (mut lines, head) = read(&log[0].bytes).unwrap();
            change(&mut lines);
            log[0].bytes = pack(&lines);
            log[0].head = Head { last: ObjectHash::of(&log[0].bytes), ..head };
            faults(&log)
        };
        assert_eq!(check(|_| {}), []);
        assert_eq!(check(|lines| lines[1].object = 2), [Fault::Torn]);
        assert_eq!(check(|lines| lines[2].previous = ObjectHash::of(b"")), [Fault::Torn]);
        assert!(matches!(
            check(|lines| lines[1].retain_until = hour(0)).as_slice(),
            [Fault::RetentionTorn { .. }]
        ));
        let gap = check(|lines| lines[1].position = 3);
        assert!(gap.contains(&Fault::PositionsMissing { expected: 2, found: 3 }), "{gap:?}");
        assert!(gap.contains(&Fault::PositionAgain { expected: 4, found: 3 }), "{gap:?}");
        assert!(check(|lines| lines.swap(0, 1)).contains(&Fault::PositionAgain { expected: 3, found: 1 }));
        let first = check(|lines| lines.iter_mut().for_each(|line| line.previous = ObjectHash::of(b"")));
        assert_eq!(first, [Fault::NotFirst]);
        // The largest numbers are numbers like others.
        let most =
            check(|lines| lines.iter_mut().for_each(|l| (l.position, l.object) = (u64::MAX, u64::MAX)));
        assert!(!most.is_empty());
    }

    #[test]
    fn retention_is_checked_against_what_is_required_and_what_the_store_says() {
        let log = log(1);
        let check = |days, kept| {
            let rules = Rules { retention_days: days, since: None };
            verify_with(rules, kept, &log, Some(&log[0].head))
                .0
                .into_iter()
                .map(|f| f.fault)
                .collect::<Vec<_>>()
        };
        let kept = |ms: i64| Kept::Until(until(hour(0)).plus_millis(2_000 + ms));
        assert_eq!(check(RETENTION_DAYS, kept(0)), []);
        assert_eq!(check(RETENTION_DAYS, kept(86_400_000)), [], "it may be extended");
        assert!(matches!(check(RETENTION_DAYS, kept(-1_000)).as_slice(), [Fault::RetentionUnkept { .. }]));
        assert_eq!(check(RETENTION_DAYS, Kept::Unlocked), [Fault::Unlocked]);
        let longer = check(RETENTION_DAYS + 2, Kept::Unknown);
        assert!(matches!(longer.as_slice(), [Fault::RetentionShort { .. }]));
    }

    #[test]
    fn a_log_past_its_head_or_with_a_broken_one_is_found() {
        let log = log(3);
        let found = verify(&log, &log[1].head);
        assert!(matches!(found.as_slice(), [Finding { fault: Fault::GoesOn { .. }, .. }]));
        assert!(names(&found, &log[2].key));
        let mut verifier = Verifier::new(tenant(), Rules::default());
        let mut found = Vec::new();
        for object in &log {
            verifier
                .object(&object.key, Kept::Unknown, object.bytes.as_slice(), &mut |f| found.push(f))
                .unwrap();
        }
        verifier.finish(Some(b"{\"objects\":3}"), &mut |f| found.push(f));
        assert!(matches!(found.as_slice(), [Finding { fault: Fault::HeadUnreadable(_), .. }]));
    }

    #[test]
    fn a_store_that_fails_is_not_a_damaged_log() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::PermissionDenied.into())
            }
        }
        let mut verifier = Verifier::new(tenant(), Rules::default());
        let log = log(1);
        let half = log[0].bytes.get(..20).unwrap().chain(Broken);
        let result = verifier.object(&log[0].key, Kept::Unknown, half, &mut |f| panic!("{f}"));
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn a_finding_is_one_line_whatever_it_quotes() {
        let fault = Fault::RecordAgain { id: "a\nb".into() };
        let finding = Finding { place: "tenant=acme/\u{1b}[2J\nx".into(), position: Some(7), fault };
        assert_eq!(
            finding.to_string(),
            r"tenant=acme/\u{1b}[2J\nx, line 7 of the log: record a\nb is there twice"
        );
    }
}

//! How a tenant is deprovisioned: a saga of steps, each of which may be done again, and the receipt that
//! it ends with. Pure; [`crate::aws::deprovisionings`] keeps the saga, and what is done at each step is
//! the eraser's.
//!
//! What a step is going to delete is counted, and the count written down, before anything of it is
//! deleted. So the receipt's counts are right wherever the work stopped and went on.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use rand::CryptoRng;
use serde::{Deserialize, Serialize};

use crate::clock::{Timestamp, rfc3339};
use crate::ids::InvalidId;
use crate::meter::Ticket;
use crate::random;
use crate::scope::RequestId;
use crate::tenant::TenantId;

/// How long a look into every store is good for a receipt: half a minute.
const LOOK_HOLDS_MS: u64 = 30_000;
/// Random characters of an id: 131 bits.
const TAIL: usize = 22;

/// A deprovisioning: `dep_<tenant>_<22 base-62 characters>`. It names its tenant, so that it is found
/// without a search; a tenant's id cannot hold the `_` that ends it here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeprovisioningId {
    tenant_id: TenantId,
    tail: String,
}

impl DeprovisioningId {
    /// A new one of that tenant.
    pub fn new(tenant_id: TenantId, rng: &mut impl CryptoRng) -> Self {
        Self { tenant_id, tail: random::base62(TAIL, rng) }
    }

    /// The tenant.
    pub const fn tenant_id(&self) -> &TenantId {
        &self.tenant_id
    }

    /// What tells it from the tenant's others.
    pub fn tail(&self) -> &str {
        &self.tail
    }
}

impl FromStr for DeprovisioningId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let parts = text.strip_prefix("dep_").and_then(|rest| rest.split_once('_'));
        let parsed = parts.and_then(|(tenant, tail)| Some((tenant.parse().ok()?, tail.to_owned())));
        match parsed {
            Some((tenant_id, tail)) if random::is_base62(&tail, TAIL) => Ok(Self { tenant_id, tail }),
            _ => Err(InvalidId::new("a deprovisioning id is one that an answer gave")),
        }
    }
}

impl TryFrom<String> for DeprovisioningId {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<DeprovisioningId> for String {
    fn from(id: DeprovisioningId) -> Self {
        id.to_string()
    }
}

impl fmt::Display for DeprovisioningId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dep_{}_{}", self.tenant_id, self.tail)
    }
}

/// The steps, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Nothing is admitted any more.
    Disable,
    /// What was admitted before has ended, and is on record and on the bill.
    Drain,
    /// The vector collection.
    Vectors,
    /// Conversations with their turns, answers, and first results under idempotency keys.
    Conversations,
    /// Documents.
    Documents,
    /// Uploaded files, in all their versions.
    Uploads,
    /// Secrets of the tenant's own.
    Secrets,
    /// Keys, issuers, messages about budgets, and whatever else the tenant's partition holds.
    Keys,
    /// The meter.
    Meter,
    /// A fresh look into every store.
    Verify,
    /// The receipt, and the tombstone in the place of the tenant's record.
    Receipt,
}

impl Step {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Disable,
        Self::Drain,
        Self::Vectors,
        Self::Conversations,
        Self::Documents,
        Self::Uploads,
        Self::Secrets,
        Self::Keys,
        Self::Meter,
        Self::Verify,
        Self::Receipt,
    ];
}

/// What holds something of a tenant, as the receipt lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Store {
    /// The vector collection: one, or none.
    Collections,
    /// Passages in it.
    Passages,
    /// Conversations, as they are listed.
    Conversations,
    /// Turns of conversations.
    Turns,
    /// Whose each answer is, and what was said of it.
    Answers,
    /// Whatever else stands beside them: first results under idempotency keys.
    IdempotencyRecords,
    /// Documents.
    Documents,
    /// Versions of uploaded files, and delete markers.
    Uploads,
    /// Secrets.
    Secrets,
    /// API keys.
    Keys,
    /// Issuers of tokens, and what says that they are the tenant's.
    Issuers,
    /// Whatever else stands beside the tenant's record.
    Settings,
    /// Messages about budgets.
    Webhooks,
    /// Meters: one, or none.
    Meters,
}

impl Store {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Collections,
        Self::Passages,
        Self::Conversations,
        Self::Turns,
        Self::Answers,
        Self::IdempotencyRecords,
        Self::Documents,
        Self::Uploads,
        Self::Secrets,
        Self::Keys,
        Self::Issuers,
        Self::Settings,
        Self::Webhooks,
        Self::Meters,
    ];

    /// The step that empties it.
    pub const fn step(self) -> Step {
        match self {
            Self::Collections | Self::Passages => Step::Vectors,
            Self::Conversations | Self::Turns | Self::Answers | Self::IdempotencyRecords => {
                Step::Conversations
            }
            Self::Documents => Step::Documents,
            Self::Uploads => Step::Uploads,
            Self::Secrets => Step::Secrets,
            Self::Keys | Self::Issuers | Self::Settings | Self::Webhooks => Step::Keys,
            Self::Meters => Step::Meter,
        }
    }
}

/// How many there are in each store.
pub type Counts = BTreeMap<Store, u64>;

/// Where a step stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// Not begun.
    #[default]
    Pending,
    /// Begun; what it deletes is counted.
    Running,
    /// Done.
    Done,
}

/// A step, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The step.
    pub step: Step,
    /// Where it stands.
    #[serde(default)]
    pub state: StepState,
    /// What it has found and deleted, or is deleting.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub deleted: Counts,
    /// When it was begun last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it was done last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
}

/// A deprovisioning as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saga {
    /// The tenant.
    pub tenant_id: TenantId,
    /// Its id.
    pub id: DeprovisioningId,
    /// The operator who asked for it, by ARN.
    pub operator: String,
    /// The request in which it was asked for.
    pub request_id: RequestId,
    /// The vector cluster of the tenant's collection.
    pub cell: String,
    /// The epoch from which on nothing is admitted.
    pub epoch: u64,
    /// When it was asked for.
    pub started_at: Timestamp,
    /// The steps.
    pub steps: Vec<Progress>,
    /// What the last look into every store found.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub found: Counts,
    /// The tenant's last ticket, once the meter is about to go.
    pub last_ticket: Ticket,
    /// The receipt, once there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Receipt>,
    /// Until when requests that were let in by what API Gateway remembers may still be under way. The
    /// stores are looked at once more then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watched_until: Option<Timestamp>,
    /// Whether that has been done, and nothing is left to do.
    #[serde(default)]
    pub closed: bool,
    /// Grows with each change, so that of two who work on it one learns of the other.
    pub revision: u64,
    /// Until when somebody is believed to be at work on it, in seconds.
    #[serde(default)]
    pub held_until_s: i64,
}

/// What a tenant's record is replaced with: nothing of it but its id, and what a later tenant of that id
/// has to begin after.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// The id that is not given again, unless an operator says so.
    pub tenant_id: TenantId,
    /// When the tenant was gone.
    pub deleted_at: Timestamp,
    /// The deprovisioning.
    pub deprovisioning_id: DeprovisioningId,
    /// The last epoch: a decision about one of the tenant's keys is no later. Not called as the tenant's own
    /// was, so that no condition on that holds any more.
    pub last_epoch: u64,
    /// The last ticket.
    pub last_ticket: Ticket,
}

/// What was deleted, what a fresh look found, and what is kept. Bounded: its lists name kinds of things.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// The deprovisioning.
    pub deprovisioning_id: DeprovisioningId,
    /// When it was asked for.
    #[serde(with = "rfc3339")]
    pub started_at: Timestamp,
    /// When the last look was taken.
    #[serde(with = "rfc3339")]
    pub verified_at: Timestamp,
    /// Every store.
    pub stores: Vec<Emptied>,
    /// What is not deleted.
    pub kept: Vec<Kept>,
}

/// A store in a receipt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Emptied {
    /// The store.
    pub store: Store,
    /// How many were deleted.
    pub deleted: u64,
    /// How many a fresh look found afterwards: none.
    pub found: u64,
}

/// Something that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// What.
    pub what: KeptWhat,
    /// How many of it.
    pub count: u64,
    /// Until when at least; without it, until the id is given again.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "rfc3339::option")]
    pub until: Option<Timestamp>,
}

/// What is kept when a tenant is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeptWhat {
    /// Records of the audit log.
    AuditRecords,
    /// Lines of the bills.
    BillLines,
    /// Backups of the tables that have been emptied: point-in-time recovery goes so far back.
    TableBackups,
    /// What stands in the place of the tenant's record, and this deprovisioning.
    Tombstone,
}

impl Saga {
    /// A deprovisioning that begins now.
    pub fn new(
        id: DeprovisioningId,
        (operator, request_id): (String, RequestId),
        (cell, epoch): (String, u64),
        now: Timestamp,
    ) -> Self {
        let blank = |step| Progress {
            step,
            state: StepState::Pending,
            deleted: Counts::new(),
            started_at: None,
            ended_at: None,
        };
        Self {
            tenant_id: id.tenant_id().clone(),
            id,
            operator,
            request_id,
            cell,
            epoch,
            started_at: now,
            steps: Step::ALL.map(blank).into(),
            found: Counts::new(),
            last_ticket: Ticket(0),
            receipt: None,
            watched_until: None,
            closed: false,
            revision: 0,
            held_until_s: 0,
        }
    }

    /// The first step that is not done, if there is one.
    pub fn next(&self) -> Option<&Progress> {
        self.steps.iter().find(|progress| progress.state != StepState::Done)
    }

    fn step(&mut self, step: Step) -> Option<&mut Progress> {
        self.steps.iter_mut().find(|progress| progress.step == step)
    }

    /// Begins a step that has found this to delete. Done once, however often the step is tried.
    pub fn begin(&mut self, step: Step, found: &Counts, now: Timestamp) {
        if let Some(progress) = self.step(step)
            && progress.state == StepState::Pending
        {
            progress.state = StepState::Running;
            progress.started_at = Some(now);
            for (store, count) in found {
                *progress.deleted.entry(*store).or_default() += count;
            }
        }
    }

    /// Ends a step.
    pub fn end(&mut self, step: Step, now: Timestamp) {
        if let Some(progress) = self.step(step) {
            progress.state = StepState::Done;
            progress.ended_at = Some(now);
        }
    }

    /// Has a step done again.
    pub fn reopen(&mut self, step: Step) {
        if let Some(progress) = self.step(step) {
            progress.state = StepState::Pending;
        }
    }

    /// Takes a fresh look into account: the steps that own what it found are to be done again, and then
    /// the look. Says whether there was anything.
    pub fn looked(&mut self, found: &Counts, now: Timestamp) -> bool {
        let left: Vec<Step> =
            found.iter().filter(|(_, count)| **count > 0).map(|(store, _)| store.step()).collect();
        left.iter().for_each(|step| self.reopen(*step));
        self.found = found.clone();
        let verified = if left.is_empty() { StepState::Done } else { StepState::Pending };
        if let Some(progress) = self.step(Step::Verify) {
            progress.state = verified;
            progress.started_at = Some(now);
            progress.ended_at = left.is_empty().then_some(now);
        }
        !left.is_empty()
    }

    /// How many of each store were deleted.
    pub fn deleted(&self, store: Store) -> u64 {
        self.steps.iter().filter_map(|progress| progress.deleted.get(&store)).sum()
    }

    /// Its receipt, as of the last look; none if that is older than `LOOK_HOLDS_MS` or did not see every
    /// store empty: then it has to be taken again.
    pub fn receipt(&self, kept: Vec<Kept>, now: Timestamp) -> Option<Receipt> {
        let verify = self.steps.iter().find(|progress| progress.step == Step::Verify)?;
        let verified_at = verify.ended_at.filter(|at| now.millis_since(*at) <= LOOK_HOLDS_MS)?;
        let stores = Store::ALL.map(|store| {
            let found = *self.found.get(&store)?;
            (found == 0).then(|| Emptied { store, deleted: self.deleted(store), found })
        });
        Some(Receipt {
            deprovisioning_id: self.id.clone(),
            started_at: self.started_at,
            verified_at,
            stores: stores.into_iter().collect::<Option<_>>()?,
            kept,
        })
    }

    /// What takes the place of the tenant's record.
    pub fn tombstone(&self, last_epoch: u64, now: Timestamp) -> Tombstone {
        Tombstone {
            tenant_id: self.tenant_id.clone(),
            deleted_at: now,
            deprovisioning_id: self.id.clone(),
            last_epoch,
            last_ticket: self.last_ticket,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::entropy;

    const NOW: Timestamp = Timestamp::from_millis(1_790_000_000_000);

    fn saga() -> Saga {
        let id = DeprovisioningId::new("acme-1".parse().unwrap(), &mut entropy());
        let asked = ("arn:aws:iam::1:user/op".to_owned(), RequestId::from("r".to_owned()));
        Saga::new(id, asked, ("default".to_owned(), 3), NOW)
    }

    #[test]
    fn an_id_names_its_tenant_and_no_other_text_is_one() {
        let id = saga().id;
        assert_eq!(id.to_string().parse::<DeprovisioningId>().unwrap(), id);
        assert_eq!(id.tenant_id().as_str(), "acme-1");
        let tail = id.tail();
        for bad in [
            format!("dep_acme-1_{tail}x"),
            format!("dep_acme-1{tail}"),
            format!("dep__{tail}"),
            format!("dep_acme-1__{tail}"),
            format!("dep_Acme_{tail}"),
            format!("dep_acme_{}#", tail.get(1..).unwrap()),
            String::new(),
        ] {
            assert!(bad.parse::<DeprovisioningId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn steps_come_in_their_order_and_each_store_has_one() {
        let mut saga = saga();
        for step in Step::ALL {
            assert_eq!(saga.next().unwrap().step, step);
            saga.begin(step, &Counts::new(), NOW);
            saga.end(step, NOW);
        }
        assert!(saga.next().is_none());
        for store in Store::ALL {
            assert!((Step::Drain..Step::Verify).contains(&store.step()));
        }
    }

    #[test]
    fn what_is_deleted_is_counted_once_however_often_the_step_is_tried() {
        let mut saga = saga();
        let found = Counts::from([(Store::Turns, 5), (Store::IdempotencyRecords, 2)]);
        saga.begin(Step::Conversations, &found, NOW);
        // It was stopped half-way, and finds less.
        saga.begin(Step::Conversations, &Counts::from([(Store::Turns, 3)]), NOW);
        saga.end(Step::Conversations, NOW);
        assert_eq!((saga.deleted(Store::Turns), saga.deleted(Store::IdempotencyRecords)), (5, 2));
    }

    #[test]
    fn what_a_look_finds_is_deleted_and_looked_for_again() {
        let mut saga = saga();
        Step::ALL.into_iter().take(9).for_each(|step| {
            saga.begin(step, &Counts::from([(Store::Documents, u64::from(step == Step::Documents))]), NOW);
            saga.end(step, NOW);
        });
        assert!(saga.looked(&Counts::from([(Store::Turns, 0), (Store::Documents, 4)]), NOW));
        assert_eq!(saga.next().unwrap().step, Step::Documents);
        saga.begin(Step::Documents, &Counts::from([(Store::Documents, 4)]), NOW);
        saga.end(Step::Documents, NOW);
        assert_eq!(saga.next().unwrap().step, Step::Verify);
        let empty: Counts = Store::ALL.map(|store| (store, 0)).into();
        assert!(!saga.looked(&empty, NOW));
        assert_eq!(saga.next().unwrap().step, Step::Receipt);
        let later = NOW.plus_millis(29_000);
        let receipt = saga.receipt(Vec::new(), later).unwrap();
        assert_eq!((receipt.stores.len(), receipt.verified_at), (Store::ALL.len(), NOW));
        assert_eq!(saga.deleted(Store::Documents), 5);
        assert!(receipt.stores.iter().all(|store| store.found == 0));
    }

    #[test]
    fn a_receipt_says_what_was_seen_and_when_or_nothing() {
        let empty: Counts = Store::ALL.map(|store| (store, 0)).into();
        let mut saga = saga();
        assert_eq!(saga.receipt(Vec::new(), NOW), None, "nobody has looked");
        saga.looked(&empty, NOW);
        assert!(saga.receipt(Vec::new(), NOW).is_some());
        assert_eq!(saga.receipt(Vec::new(), NOW.plus_millis(31_000)), None, "it is long ago");
        for store in Store::ALL {
            let mut partly = empty.clone();
            partly.remove(&store);
            saga.looked(&partly, NOW);
            assert_eq!(saga.receipt(Vec::new(), NOW), None, "{store:?} was not looked at");
            partly.insert(store, 1);
            saga.looked(&partly, NOW);
            assert_eq!(saga.receipt(Vec::new(), NOW), None, "{store:?} was not empty");
        }
    }
}

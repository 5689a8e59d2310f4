//! What a tenant is told of its budgets, by a request to an address of its own: which thresholds are
//! crossed, what the message says, how it is signed and when it is tried again. Pure;
//! [`crate::aws::webhooks`] keeps the messages.
//!
//! The signature is the scheme of <https://docs.stripe.com/webhooks#verify-manually>, for which receivers
//! have libraries: `t=<unix seconds>,v1=<hex of HMAC-SHA-256 of "<t>.<body>">`.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use rand::CryptoRng;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::Sha256;

use crate::clock::Timestamp;
use crate::internet;
use crate::limits::Limits;
use crate::meter::{BillingMonth, Day, Meter};
use crate::retry::Backoff;
use crate::secret::Secret;
use crate::tenant::{Tenant, TenantId};

/// The header that carries the signature.
pub const SIGNATURE: &str = "x-bulkhead-signature";
/// The percentages of a budget that are told.
pub const THRESHOLDS: [u8; 3] = [50, 80, 100];
/// The last of them: nothing is left.
pub const USED_UP: u8 = 100;
/// From here on, a request that the budget refused means that it is used up: what is left is less than
/// what the tenant asks for. (No budget ends at its last token, since nothing overshoots it.)
pub const NEARLY_USED_UP: u8 = 80;
/// How long a message is tried.
pub const TRIED_FOR_MS: u64 = 86_400_000;
/// How long a message is kept: longer than the month whose threshold it keeps from being told twice.
const KEPT_DAYS: u32 = 40;
/// No try follows another sooner, so that one that takes its whole time has ended before.
const LEAST_WAIT: Duration = Duration::from_secs(20);
const BACKOFF: Backoff =
    Backoff { attempts: 100, base: Duration::from_secs(20), cap: Duration::from_secs(3_600) };

/// What a budget is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Period {
    /// `tokens_per_day`
    Day(Day),
    /// `monthly_token_budget`
    Month(BillingMonth),
}

impl Period {
    /// `day` or `month`.
    pub const fn kind(self) -> &'static str {
        match self {
            Self::Day(_) => "day",
            Self::Month(_) => "month",
        }
    }

    /// The name of its limit.
    pub const fn limit(self) -> &'static str {
        match self {
            Self::Day(_) => crate::meter::Limit::Day.name(),
            Self::Month(_) => crate::meter::Limit::Month.name(),
        }
    }
}

/// The day or month alone, as in `2026-11-24`.
impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Day(day) => day.fmt(f),
            Self::Month(month) => month.fmt(f),
        }
    }
}

/// A budget, and how much of it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Of what.
    pub period: Period,
    /// Tokens settled and reserved.
    pub used: u64,
    /// The limit.
    pub limit: u64,
}

impl Budget {
    /// The budgets of the present day and month, as the tenant's meter has them. A meter whose clock shows
    /// another day has not counted anything in this one: what it says is over.
    pub fn of(meter: &Meter, limits: &Limits, now: Timestamp) -> Vec<Self> {
        let (day, month) = (Day::of(now.as_seconds()), BillingMonth::of(now.as_seconds()));
        let mut budgets = Vec::new();
        if meter.day == day {
            let limit = limits.tokens_per_day;
            budgets.push(Self { period: Period::Day(day), used: meter.day_tokens, limit });
        }
        if meter.month == month {
            let limit = limits.monthly_token_budget;
            budgets.push(Self { period: Period::Month(month), used: meter.month_tokens, limit });
        }
        budgets
    }

    /// Whether so many percent of the budget are used, without a rounding. Of a budget of nothing, nothing
    /// is ever used.
    pub const fn has_reached(&self, percent: u8) -> bool {
        self.limit > 0 && self.used as u128 * 100 >= self.limit as u128 * percent as u128
    }

    /// The thresholds that are crossed; `refused` says whether the budget has refused a request of late.
    pub fn crossed(&self, refused: bool) -> impl Iterator<Item = u8> {
        let used_up = refused && self.has_reached(NEARLY_USED_UP);
        let budget = *self;
        THRESHOLDS
            .into_iter()
            .filter(move |percent| budget.has_reached(*percent) || (*percent == USED_UP && used_up))
    }
}

/// How a message stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It is to be delivered.
    Pending,
    /// The receiver has said that it has it.
    Delivered,
    /// The receiver has said that it wants none: HTTP 410.
    Unwanted,
    /// Its time is over.
    GivenUp,
    /// The tenant, or its address, is gone.
    Dropped,
}

/// A message: an item of table `webhooks`, which is both the outbox and what keeps a threshold from being
/// told twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The tenant.
    pub tenant_id: TenantId,
    /// Its id: the same in each try, so that receivers can tell a repeat.
    pub id: String,
    /// The budget's period.
    pub period: Period,
    /// The threshold.
    pub threshold_percent: u8,
    /// Tokens used when it was noted.
    pub used_tokens: u64,
    /// The limit then.
    pub limit_tokens: u64,
    /// Whether it is told because the budget has refused a request, though not all of it was used.
    #[serde(default)]
    pub refused: bool,
    /// When it was noted.
    pub time: Timestamp,
    /// How it stands.
    pub state: State,
    /// Tries so far, the present one included.
    pub attempts: u32,
    /// When it is to be tried next. None if it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due_at: Option<Timestamp>,
    /// Why the last try failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// When the table may forget it.
    pub expires_at_s: i64,
}

impl Message {
    /// The message that a tenant's budget has crossed a threshold.
    pub fn new(tenant: &Tenant, budget: Budget, percent: u8, now: Timestamp) -> Self {
        let Budget { period, used, limit } = budget;
        Self {
            tenant_id: tenant.tenant_id.clone(),
            id: format!("evt_{}_{period}_{percent}", tenant.tenant_id),
            period,
            threshold_percent: percent,
            used_tokens: used,
            limit_tokens: limit,
            refused: !budget.has_reached(percent),
            time: now,
            state: State::Pending,
            attempts: 0,
            due_at: Some(now),
            last_error: None,
            expires_at_s: now.plus_days(KEPT_DAYS).as_seconds(),
        }
    }

    /// What is sent: the same bytes in each try.
    pub fn body(&self) -> String {
        let mut body = json!({
            "reason": if self.refused { "refused" } else { "used" },
            "id": self.id,
            "type": "budget.threshold",
            "tenant_id": self.tenant_id,
            "period": self.period.kind(),
            "threshold_percent": self.threshold_percent,
            "used_tokens": self.used_tokens,
            "limit_tokens": self.limit_tokens,
            "time": self.time.to_string(),
        });
        if let Some(fields) = body.as_object_mut() {
            fields.insert(self.period.kind().to_owned(), self.period.to_string().into());
        }
        body.to_string()
    }

    /// When it is tried again, should the try that begins now fail; none if that is the last.
    pub fn next_try(&self, now: Timestamp, rng: &mut impl CryptoRng) -> Option<Timestamp> {
        let wait = LEAST_WAIT + BACKOFF.wait(self.attempts + 1, None, rng)?;
        let next = now.plus_millis(i64::try_from(wait.as_millis()).unwrap_or(i64::MAX));
        (next.millis_since(self.time) < TRIED_FOR_MS).then_some(next)
    }
}

/// A tenant's own key, made of the deployment's and shown as text. One tenant's says nothing of another's,
/// and none is kept anywhere.
#[derive(Clone)]
pub struct SigningKey(String);

impl SigningKey {
    /// The tenant's key under the deployment's. One that is given the id of a deleted tenant has another.
    pub fn of(root: &Secret, tenant: &Tenant) -> Self {
        Self::since(root, &tenant.tenant_id, tenant.created_at)
    }

    fn since(root: &Secret, tenant: &TenantId, created_at: Timestamp) -> Self {
        let text = format!("bulkhead/webhooks/{tenant}/{}", created_at.as_millis());
        Self(format!("whsec_{}", hex::encode(mac(root.expose().as_bytes(), text.as_bytes()))))
    }

    /// The key, for the tenant's eyes.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningKey(…)")
    }
}

/// The header's value for a body that is sent now: a signature with each of the keys. While a key is being
/// replaced there are two, and a receiver that knows either is content.
pub fn signature<'a>(keys: impl IntoIterator<Item = &'a SigningKey>, body: &str, now: Timestamp) -> String {
    let t = now.as_seconds();
    let signed = format!("{t}.{body}");
    let mut header = format!("t={t}");
    for key in keys {
        header.push_str(",v1=");
        header.push_str(&hex::encode(mac(key.0.as_bytes(), signed.as_bytes())));
    }
    header
}

fn mac(key: &[u8], text: &[u8]) -> [u8; 32] {
    #[expect(clippy::expect_used, reason = "HMAC takes a key of any length")]
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("a key of any length");
    mac.update(text);
    mac.finalize().into_bytes().into()
}

/// Which receivers are spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receivers {
    /// Those on the public internet, by https.
    Public,
    /// Those on this machine's loopback addresses too, also by http.
    Loopback,
}

/// A text that names no receivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("receivers are `public` or `loopback`")]
pub struct InvalidReceivers;

impl std::str::FromStr for Receivers {
    type Err = InvalidReceivers;

    fn from_str(text: &str) -> Result<Self, InvalidReceivers> {
        match text {
            "public" => Ok(Self::Public),
            "loopback" => Ok(Self::Loopback),
            _ => Err(InvalidReceivers),
        }
    }
}

impl Receivers {
    /// Whether an address may be connected to: one of the public internet, so that no message is sent to
    /// what stands beside the sender, such as an instance's metadata.
    pub fn admit(self, address: IpAddr) -> bool {
        match address.to_canonical() {
            address if address.is_loopback() => self == Self::Loopback,
            address => internet::holds(address),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;
    use crate::random::entropy;
    use crate::tenant::TenantStatus;

    /// 2026-11-28, ten hours into the day.
    const NOW: Timestamp = Timestamp::from_millis(1_795_860_000_000);

    fn budget(used: u64, limit: u64) -> Budget {
        Budget { period: Period::Day(Day::of(NOW.as_seconds())), used, limit }
    }

    fn message() -> Message {
        Message {
            tenant_id: "acme".parse().unwrap(),
            id: "evt_acme_2026-11-28_80".to_owned(),
            period: Period::Day(Day::of(NOW.as_seconds())),
            threshold_percent: 80,
            used_tokens: 801,
            limit_tokens: 1_000,
            refused: false,
            time: NOW,
            state: State::Pending,
            attempts: 0,
            due_at: Some(NOW),
            last_error: None,
            expires_at_s: 0,
        }
    }

    #[test]
    fn thresholds_are_crossed_exactly() {
        let crossed = |used, limit, refused| budget(used, limit).crossed(refused).collect::<Vec<_>>();
        assert_eq!(crossed(499, 1_000, true), [0; 0]);
        assert_eq!(crossed(500, 1_000, false), [50]);
        assert_eq!(crossed(799, 1_000, true), [50]);
        assert_eq!(crossed(800, 1_000, false), [50, 80]);
        assert_eq!(crossed(800, 1_000, true), [50, 80, 100]);
        assert_eq!(crossed(999, 1_000, false), [50, 80]);
        assert_eq!(crossed(1_000, 1_000, false), [50, 80, 100]);
        assert_eq!(crossed(1, 3, false), [0; 0]);
        assert_eq!(crossed(2, 3, false), [50]);
        assert_eq!(crossed(u64::MAX, u64::MAX, false), [50, 80, 100]);
        assert_eq!(crossed(0, 0, true), [0; 0]);
    }

    #[test]
    fn a_day_and_a_month_that_are_over_say_nothing() {
        let limits = Limits::of_tier(crate::tenant::Tier::Professional);
        let meter = |at: Timestamp| Meter {
            day_tokens: 7,
            month_tokens: 9,
            ..Meter::new(TenantStatus::Active, 1, at)
        };
        let kinds = |meter: &Meter, now| {
            let budgets = Budget::of(meter, &limits, now);
            budgets.iter().map(|s| (s.period.kind(), s.used)).collect::<Vec<_>>()
        };
        assert_eq!(kinds(&meter(NOW), NOW), [("day", 7), ("month", 9)]);
        assert_eq!(kinds(&meter(NOW), NOW.plus_days(1)), [("month", 9)]);
        assert_eq!(kinds(&meter(NOW), NOW.plus_days(3)), []);
        assert_eq!(kinds(&meter(NOW.plus_days(1)), NOW), [("month", 9)]);
    }

    #[test]
    fn a_message_says_all_and_always_the_same() {
        let body: serde_json::Value = serde_json::from_str(&message().body()).unwrap();
        let wanted = json!({
            "id": "evt_acme_2026-11-28_80", "type": "budget.threshold", "tenant_id": "acme", "period": "day",
            "day": "2026-11-28", "threshold_percent": 80, "used_tokens": 801, "limit_tokens": 1_000,
            "reason": "used", "time": NOW.to_string(),
        });
        assert_eq!(body, wanted);
        assert_eq!(message().body(), Message { attempts: 3, ..message() }.body());
        let refused = Message { refused: true, ..message() }.body();
        assert!(refused.contains(r#""reason":"refused""#), "{refused}");
    }

    #[test]
    fn a_signature_is_that_of_the_time_the_body_and_the_key() {
        // RFC 4231, test case 2.
        let known = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        assert_eq!(hex::encode(mac(b"Jefe", b"what do ya want for nothing?")), known);
        let root = |text: &str| Secret::new(text.to_owned()).unwrap();
        let key = |text: &str, tenant: &str| SigningKey::since(&root(text), &tenant.parse().unwrap(), NOW);
        let later = SigningKey::since(&root("root"), &"acme".parse().unwrap(), NOW.plus_millis(1));
        let keys =
            [key("root", "acme"), key("other", "acme"), key("root", "acme-1"), key("root", "acme1"), later];
        let signatures = keys.each_ref().map(|key| signature([key], "{}", NOW));
        let distinct: std::collections::BTreeSet<_> = signatures.iter().collect();
        assert_eq!(distinct.len(), keys.len());
        assert_ne!(signature([&keys[0]], "{} ", NOW), signatures[0]);
        assert_ne!(signature([&keys[0]], "{}", NOW.plus_millis(1_000)), signatures[0]);
        let both = signature(&keys[..2], "{}", NOW);
        let (t, first) = signatures[0].split_once(',').unwrap();
        assert_eq!(t, "t=1795860000");
        assert_eq!(both, format!("{t},{first},{}", signatures[1].split_once(',').unwrap().1));
        assert!(!format!("{:?}", keys[0]).contains(keys[0].expose()));
    }

    #[test]
    fn tries_thin_out_and_end_within_a_day() {
        for _ in 0..50 {
            let (mut message, mut now, mut tries) = (message(), NOW, 0);
            while let Some(next) = message.next_try(now, &mut entropy()) {
                let wait = next.millis_since(now);
                assert!((20_000..=3_620_000).contains(&wait), "{wait}");
                message.attempts += 1;
                (now, tries) = (next, tries + 1);
            }
            assert!(now.millis_since(NOW) < TRIED_FOR_MS);
            // Many in the first hours, and then about two an hour.
            assert!((20..100).contains(&tries), "{tries}");
        }
    }

    #[test]
    fn only_places_of_the_public_internet_are_connected_to() {
        for inside in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.192",
            "192.0.2.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:10.0.0.1",
            "::ffff:169.254.169.254",
            "::10.0.0.1",
            "64:ff9b::a00:1",
            "fe80::1",
            "fc00::1",
            "fd00:ec2::254",
            "ff02::1",
            "2001::1",
            "2001:db8::1",
            "2002:a00:1::",
            "3fff::1",
        ] {
            assert!(!Receivers::Public.admit(inside.parse().unwrap()), "{inside}");
        }
        for public in
            ["1.1.1.1", "172.32.0.1", "100.128.0.1", "192.1.0.1", "::ffff:8.8.8.8", "2606:4700::1111"]
        {
            assert!(Receivers::Public.admit(public.parse().unwrap()), "{public}");
        }
        for near in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
            assert!(Receivers::Loopback.admit(near.parse().unwrap()), "{near}");
        }
        assert!(!Receivers::Loopback.admit("169.254.169.254".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn what_crosses_a_threshold_has_crossed_those_below(used: u64, limit: u64, refused: bool) {
            let crossed: Vec<u8> = budget(used, limit).crossed(refused).collect();
            prop_assert_eq!(&crossed[..], &THRESHOLDS[..crossed.len()]);
            let more: Vec<u8> = budget(used.saturating_add(1), limit).crossed(refused).collect();
            prop_assert!(more.len() >= crossed.len());
        }

        #[test]
        fn no_mapped_address_opens_what_its_own_does_not(bits: u32) {
            let v4 = Ipv4Addr::from(bits);
            for receivers in [Receivers::Public, Receivers::Loopback] {
                let mapped = receivers.admit(IpAddr::V6(v4.to_ipv6_mapped()));
                prop_assert_eq!(mapped, receivers.admit(IpAddr::V4(v4)));
            }
            let std_says = v4.is_private() || v4.is_link_local() || v4.is_multicast() || v4.is_loopback();
            prop_assert!(!(std_says && Receivers::Public.admit(IpAddr::V4(v4))));
        }
    }
}

//! The keys that issuers publish: fetched when a token needs them, and remembered.
//!
//! The address is a tenant's choice and a stranger's token sets the fetch off, so a fetch is bounded in what it
//! reaches, in time, in size and in how often it is made.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use crate::clock::{Clock, Timestamp};
use crate::internet::{self, Guarded};
use crate::issuer::{JwksUrl, PublicKey, Reach, published};
use crate::roots::{self, RootsError};
use crate::tenant::{Tenant, TenantId};

/// How long a fetch may take, from the look-up of the name to the last byte.
const PATIENCE: Duration = Duration::from_secs(2);
/// The largest set, in bytes.
const LARGEST: usize = 64 * 1_024;
/// How long keys are used before they are fetched again, in milliseconds.
const FRESH_MS: u64 = 10 * 60_000;
/// How long keys are used while their address does not answer. Tokens seldom live longer than that, and new
/// ones are hardly issued by an issuer that is down.
const USABLE_MS: u64 = 60 * 60_000;
/// How long it takes until a name that is not among the keys is worth another fetch.
const PAUSE_MS: u64 = 30_000;
/// How long an address that failed is left alone: an issuer that answers slowly must not take the time of
/// others' requests. It doubles with each further failure, so often at most.
const RETRY_MS: u64 = 10_000;
const MOST_DOUBLINGS: u32 = 4;
/// How long the issuers of one tenant may keep a process waiting, all together: so much at once, and again over
/// a minute. Whatever addresses they have, the time of others' requests is not theirs.
const WAITING_MS: i64 = 4_000;
const WAITING_OVER_MS: i64 = 60_000;
/// Sets that are remembered. An instance that sees more than this fetches some of them again.
const REMEMBERED: usize = 128;
/// Tenants whose waiting is remembered. Beyond that those are forgotten who may keep a process waiting as long
/// as anybody, and then all.
const WAITED_FOR: usize = 512;

/// The keys cannot be told: neither that a token is genuine, nor that it is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the issuer's keys cannot be fetched")]
pub struct Unreachable;

/// The sets that one process knows.
pub struct KeySets {
    reach: Reach,
    clock: Clock,
    /// Made when it is first needed: a process that sees keys alone never pays for it.
    http: OnceLock<reqwest::Client>,
    known: Mutex<HashMap<JwksUrl, Arc<Known>>>,
    waiting: Mutex<HashMap<TenantId, Waiting>>,
}

/// How long a tenant's issuers may still keep a process waiting. Pure.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    left_ms: i64,
    at: Timestamp,
}

impl Waiting {
    const fn new(now: Timestamp) -> Self {
        Self { left_ms: WAITING_MS, at: now }
    }

    /// As it is now: what was used comes back over the minute.
    fn now(self, now: Timestamp) -> Self {
        let passed_ms = i64::try_from(now.millis_since(self.at)).unwrap_or(i64::MAX).min(2 * WAITING_OVER_MS);
        let left_ms = self.left_ms.saturating_add(passed_ms * WAITING_MS / WAITING_OVER_MS);
        // What is not a whole millisecond yet is not lost.
        if left_ms == self.left_ms { self } else { Self { left_ms: left_ms.min(WAITING_MS), at: now } }
    }
}

/// One address. The lock is held while it is asked, so that it is asked once by all who wait.
#[derive(Default)]
struct Known {
    set: tokio::sync::Mutex<Remembered>,
    used_at: Mutex<Option<Timestamp>>,
}

/// What is remembered of one address. Pure.
#[derive(Debug, Default)]
struct Remembered {
    keys: Arc<[PublicKey]>,
    fetched_at: Option<Timestamp>,
    /// When it was last fetched for the sake of a name that was not among the keys.
    sought_at: Option<Timestamp>,
    /// When a fetch last failed, if none has succeeded since.
    failed_at: Option<Timestamp>,
    /// How many have failed since one succeeded.
    failures: u32,
}

impl Remembered {
    fn holds(&self, kid: Option<&str>) -> bool {
        kid.is_none_or(|kid| self.keys.iter().any(|key| key.kid.as_deref() == Some(kid)))
    }

    /// Whether the address is to be asked before a key of that name is taken.
    fn is_due(&self, kid: Option<&str>, now: Timestamp) -> bool {
        let over = |at: Option<Timestamp>, ms| at.is_none_or(|at| now.millis_since(at) >= ms);
        let left_alone_ms = RETRY_MS << self.failures.saturating_sub(1).min(MOST_DOUBLINGS);
        over(self.failed_at, left_alone_ms)
            && (over(self.fetched_at, FRESH_MS) || (!self.holds(kid) && over(self.sought_at, PAUSE_MS)))
    }

    /// Notes what a fetch brought that was made for the sake of a key of that name.
    fn note(&mut self, kid: Option<&str>, fetched: Option<Vec<PublicKey>>, now: Timestamp) {
        let Some(keys) = fetched else {
            self.failed_at = Some(now);
            self.failures = self.failures.saturating_add(1);
            return;
        };
        // The first fetch is for whatever key; only later ones can be in vain.
        if self.fetched_at.is_some() && !self.holds(kid) {
            self.sought_at = Some(now);
        }
        (self.keys, self.fetched_at, self.failed_at, self.failures) = (keys.into(), Some(now), None, 0);
    }

    /// The keys, as long as they can be relied on. Where the address does not answer, a name that is not
    /// among them may be that of a new key.
    fn keys(&self, kid: Option<&str>, now: Timestamp) -> Result<Arc<[PublicKey]>, Unreachable> {
        let usable = self.fetched_at.is_some_and(|at| now.millis_since(at) < USABLE_MS);
        if usable && (self.holds(kid) || self.failed_at.is_none()) {
            Ok(Arc::clone(&self.keys))
        } else {
            Err(Unreachable)
        }
    }
}

impl KeySets {
    /// None yet.
    pub fn new(reach: Reach, clock: Clock) -> Self {
        Self { reach, clock, http: OnceLock::new(), known: Mutex::default(), waiting: Mutex::default() }
    }

    /// The keys at an address of a tenant's issuer, for a token that names that key.
    ///
    /// # Errors
    /// [`Unreachable`]; also where the tenant's issuers have kept this process waiting long enough.
    pub async fn at(
        &self,
        tenant: &Tenant,
        url: &JwksUrl,
        kid: Option<&str>,
    ) -> Result<Arc<[PublicKey]>, Unreachable> {
        let known = self.known(url);
        let mut set = known.set.lock().await;
        let began = self.clock.now();
        if set.is_due(kid, began) {
            if self.waiting(&tenant.tenant_id, began, 0) <= 0 {
                tracing::warn!(tenant.id = %tenant.tenant_id, "A tenant's issuers have been waited for long enough");
                return if set.holds(kid) { set.keys(kid, began) } else { Err(Unreachable) };
            }
            let fetched = match tokio::time::timeout(PATIENCE, self.fetch(url)).await {
                Ok(fetched) => fetched,
                Err(_) => Err(FetchError::Slow),
            };
            if let Err(error) = &fetched {
                // The host alone: what else the address says may be a secret.
                tracing::warn!(tenant.id = %tenant.tenant_id, jwks.host = url.host(), "An issuer's keys could not be fetched: {error}");
            }
            let ended = self.clock.now();
            let took_ms = i64::try_from(ended.millis_since(began)).unwrap_or(i64::MAX);
            self.waiting(&tenant.tenant_id, ended, took_ms);
            set.note(kid, fetched.ok(), ended);
        }
        set.keys(kid, self.clock.now())
    }

    /// How long a tenant's issuers may still keep this process waiting, now that they have for `took_ms`.
    fn waiting(&self, tenant: &TenantId, now: Timestamp, took_ms: i64) -> i64 {
        let mut all = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= WAITED_FOR && !all.contains_key(tenant) {
            all.retain(|_, waiting| waiting.now(now).left_ms < WAITING_MS);
            if all.len() >= WAITED_FOR {
                all.clear();
            }
        }
        let waiting = all.entry(tenant.clone()).or_insert_with(|| Waiting::new(now));
        *waiting = waiting.now(now);
        waiting.left_ms = waiting.left_ms.saturating_sub(took_ms);
        waiting.left_ms
    }

    fn known(&self, url: &JwksUrl) -> Arc<Known> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.contains_key(url) && known.len() >= REMEMBERED {
            let at = |known: &Known| *known.used_at.lock().unwrap_or_else(PoisonError::into_inner);
            let oldest = known.iter().min_by_key(|(_, known)| at(known)).map(|(url, _)| url.clone());
            oldest.map(|url| known.remove(&url));
        }
        let entry = Arc::clone(known.entry(url.clone()).or_default());
        *entry.used_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.clock.now());
        entry
    }

    async fn fetch(&self, url: &JwksUrl) -> Result<Vec<PublicKey>, FetchError> {
        let url: reqwest::Url = url.as_str().parse().map_err(|_| FetchError::OutOfReach)?;
        // What is written as an address is not looked up, and so not seen by the resolver.
        let literal = url.host_str().and_then(|host| host.parse().ok());
        if literal.is_some_and(|ip| !reaches(self.reach, ip)) {
            return Err(FetchError::OutOfReach);
        }
        let mut answer = self.http()?.get(url).send().await.map_err(FetchError::Connection)?;
        if answer.status() != reqwest::StatusCode::OK {
            return Err(FetchError::Status(answer.status()));
        }
        let mut body = Vec::new();
        while let Some(bytes) = answer.chunk().await.map_err(FetchError::Connection)? {
            if body.len() + bytes.len() > LARGEST {
                return Err(FetchError::Large);
            }
            body.extend_from_slice(&bytes);
        }
        published(&body).map_err(|_| FetchError::Malformed)
    }

    fn http(&self) -> Result<&reqwest::Client, FetchError> {
        if let Some(http) = self.http.get() {
            return Ok(http);
        }
        let reach = self.reach;
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(roots::outbound()?)
            .dns_resolver(Guarded::new(move |ip| reaches(reach, ip)))
            .https_only(self.reach == Reach::Internet)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            // A set is fetched every few minutes: a connection that was kept would be gone.
            .pool_max_idle_per_host(0)
            .user_agent("bulkhead")
            .build()
            .map_err(FetchError::Connection)?;
        Ok(self.http.get_or_init(|| http))
    }
}

impl std::fmt::Debug for KeySets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeySets").field("reach", &self.reach).finish_non_exhaustive()
    }
}

/// Why a fetch brought no keys.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("no answer within the time allowed")]
    Slow,
    #[error("the address is not one that may be asked")]
    OutOfReach,
    #[error(transparent)]
    Roots(#[from] RootsError),
    #[error("the address cannot be reached: {0}")]
    Connection(#[source] reqwest::Error),
    #[error("HTTP {0}; redirects are not followed")]
    Status(reqwest::StatusCode),
    #[error("the set is too large")]
    Large,
    #[error("no JSON Web Key Set of at most 64 keys")]
    Malformed,
}

/// Whether an address may be asked. What answers at a link's own addresses (AWS's metadata service, the
/// Lambda runtime's neighbours) never may.
fn reaches(reach: Reach, ip: IpAddr) -> bool {
    match (reach, ip) {
        (reach, IpAddr::V6(ip)) => match internet::embedded(ip) {
            Some(v4) => reaches(reach, IpAddr::V4(v4)),
            None if reach == Reach::Internet => internet::holds(IpAddr::V6(ip)),
            None => {
                !ip.is_unspecified() && !ip.is_multicast() && !ip.is_unicast_link_local() && !metadata(ip)
            }
        },
        (Reach::Internet, ip) => internet::holds(ip),
        (Reach::Private, IpAddr::V4(ip)) => {
            let [first, ..] = ip.octets();
            first != 0 && !ip.is_link_local() && !ip.is_multicast() && !ip.is_broadcast()
        }
    }
}

/// AWS's metadata services in IPv6, which are in the range of private networks.
fn metadata(ip: Ipv6Addr) -> bool {
    ip.segments().first_chunk() == Some(&[0xfd00, 0x0ec2])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::issuer::Material;

    fn key(kid: &str) -> PublicKey {
        PublicKey { kid: Some(kid.into()), material: Material::Ed25519 { x: String::new() } }
    }

    fn tenant() -> Tenant {
        serde_json::from_value(serde_json::json!({
            "tenant_id": "acme",
            "status": "active",
            "epoch": 1,
            "tier": "free",
            "company_name": "Acme",
            "assistant_name": "Ada",
            "instructions": "",
            "injection_policy": "flag",
            "limits": crate::limits::Limits::of_tier(crate::tenant::Tier::Free),
            "cell": "default",
            "embedding": {"name": "m", "dimensions": 4},
            "created_at": 0,
        }))
        .unwrap()
    }

    fn at(s: i64) -> Timestamp {
        Timestamp::from_millis((1_790_000_000 + s) * 1_000)
    }

    #[test]
    fn only_the_internet_is_reached_unless_private_networks_are_allowed() {
        let reached = |reach, ip: &str| reaches(reach, ip.parse().unwrap());
        for public in ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::808:808"] {
            assert!(reached(Reach::Internet, public) && reached(Reach::Private, public), "{public}");
        }
        for private in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "::1",
            "fd12::1",
            "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
            "192.0.2.1",
            "198.18.0.1",
        ] {
            assert!(!reached(Reach::Internet, private) && reached(Reach::Private, private), "{private}");
        }
        for never in [
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "fe80::1",
            "fd00:ec2::254",
            "0.0.0.0",
            "::",
            "224.0.0.1",
            "255.255.255.255",
            "ff02::1",
        ] {
            assert!(!reached(Reach::Internet, never) && !reached(Reach::Private, never), "{never}");
        }
        for special in ["2001::1", "2001:db8::1", "2002:a00:1::", "3fff::1", "240.0.0.1", "4000::1"] {
            assert!(!reached(Reach::Internet, special), "{special}");
        }
    }

    #[test]
    fn an_unknown_name_is_sought_once_in_a_while() {
        let mut set = Remembered::default();
        assert!(set.is_due(Some("a"), at(0)));
        set.note(Some("a"), Some(vec![key("a")]), at(0));
        assert!(!set.is_due(Some("a"), at(1)) && !set.is_due(None, at(1)));
        // A new key is looked for at once; whoever makes names up has one fetch in 30 s.
        assert!(set.is_due(Some("b"), at(1)));
        set.note(Some("b"), Some(vec![key("a")]), at(1));
        assert!(!set.is_due(Some("c"), at(30)));
        assert!(set.keys(Some("c"), at(30)).is_ok(), "that it is unknown is known");
        assert!(set.is_due(Some("c"), at(31)));
        // Keys are fetched again before they are old.
        assert!(!set.is_due(Some("a"), at(600)) && set.is_due(Some("a"), at(601)));
    }

    #[test]
    fn while_an_address_is_silent_its_keys_hold_for_an_hour() {
        let mut set = Remembered::default();
        set.note(Some("a"), None, at(0));
        assert!(!set.is_due(Some("a"), at(9)) && set.is_due(Some("a"), at(10)));
        assert_eq!(set.keys(Some("a"), at(1)), Err(Unreachable));
        // One that fails again is left alone for longer, up to a bound.
        set.note(Some("a"), None, at(10));
        assert!(!set.is_due(Some("a"), at(29)) && set.is_due(Some("a"), at(30)));
        let mut silent = Remembered { failures: u32::MAX, failed_at: Some(at(0)), ..Remembered::default() };
        silent.note(None, None, at(0));
        assert!(!silent.is_due(None, at(159)) && silent.is_due(None, at(160)));
        set.note(Some("a"), Some(vec![key("a")]), at(30));
        set.note(Some("a"), None, at(700));
        assert_eq!(set.keys(Some("a"), at(700)).unwrap().len(), 1);
        // It may be a key that is new, or none: nobody knows.
        assert_eq!(set.keys(Some("b"), at(700)), Err(Unreachable));
        assert!(set.keys(Some("a"), at(3_629)).is_ok());
        assert_eq!(set.keys(Some("a"), at(3_630)), Err(Unreachable));
        // One that withdraws its keys is obeyed.
        set.note(Some("a"), Some(Vec::new()), at(3_640));
        assert!(set.keys(Some("a"), at(3_640)).unwrap().is_empty());
    }

    #[test]
    fn a_tenants_issuers_are_waited_for_so_long_and_no_longer() {
        let sets = KeySets::new(Reach::Internet, Clock::fixed(at(0)));
        let (acme, globex) = ("acme".parse().unwrap(), "globex".parse().unwrap());
        assert_eq!(sets.waiting(&acme, at(0), 0), WAITING_MS);
        assert_eq!(sets.waiting(&acme, at(2), 2_000), 2_000);
        assert!(sets.waiting(&acme, at(4), 2_500) <= 0, "whatever the address");
        assert_eq!(sets.waiting(&globex, at(4), 0), WAITING_MS);
        // It comes back over a minute, and never adds up to more.
        assert!(sets.waiting(&acme, at(20), 0) > 0);
        assert_eq!(sets.waiting(&acme, at(3_600), 0), WAITING_MS);
        let mut waiting = Waiting { left_ms: 0, at: at(0) };
        for ms in 0..15_000 {
            waiting = waiting.now(at(0).plus_millis(ms));
        }
        assert!((990..=1_000).contains(&waiting.left_ms), "{waiting:?}");
        for n in 0..2 * WAITED_FOR {
            sets.waiting(&format!("tenant-{n}").parse().unwrap(), at(3_600), 1);
        }
        assert!(sets.waiting.lock().unwrap().len() <= WAITED_FOR);
    }

    #[tokio::test]
    async fn few_addresses_are_remembered_and_none_is_asked_out_of_reach() {
        let sets = KeySets::new(Reach::Internet, Clock::fixed(at(0)));
        let tenant = tenant();
        for n in 0..300 {
            // Written as an address: refused before anything is asked.
            let url = format!("https://10.0.{}.{}/keys", n / 256, n % 256).parse().unwrap();
            assert_eq!(sets.at(&tenant, &url, None).await, Err(Unreachable));
        }
        assert_eq!(sets.known.lock().unwrap().len(), REMEMBERED);
        assert!(sets.http.get().is_none());
        let local = "https://localhost/keys".parse().unwrap();
        assert_eq!(sets.at(&tenant, &local, None).await, Err(Unreachable));
    }
}

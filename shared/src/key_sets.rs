//! The keys that issuers publish: fetched when a token needs them, and remembered.
//!
//! The address is a tenant's choice and a stranger's token sets the fetch off, so a fetch is bounded in what it
//! reaches, in time, in size and in how often it is made.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use crate::clock::{Clock, Timestamp};
use crate::issuer::{JwksUrl, PublicKey, Reach, published};

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
/// others' requests.
const RETRY_MS: u64 = 10_000;
/// Sets that are remembered. An instance that sees more than this fetches some of them again.
const REMEMBERED: usize = 128;

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
}

impl Remembered {
    fn holds(&self, kid: Option<&str>) -> bool {
        kid.is_none_or(|kid| self.keys.iter().any(|key| key.kid.as_deref() == Some(kid)))
    }

    /// Whether the address is to be asked before a key of that name is taken.
    fn is_due(&self, kid: Option<&str>, now: Timestamp) -> bool {
        let over = |at: Option<Timestamp>, ms| at.is_none_or(|at| now.millis_since(at) >= ms);
        over(self.failed_at, RETRY_MS)
            && (over(self.fetched_at, FRESH_MS) || (!self.holds(kid) && over(self.sought_at, PAUSE_MS)))
    }

    /// Notes what a fetch brought that was made for the sake of a key of that name.
    fn note(&mut self, kid: Option<&str>, fetched: Option<Vec<PublicKey>>, now: Timestamp) {
        let Some(keys) = fetched else {
            self.failed_at = Some(now);
            return;
        };
        // The first fetch is for whatever key; only later ones can be in vain.
        if self.fetched_at.is_some() && !self.holds(kid) {
            self.sought_at = Some(now);
        }
        (self.keys, self.fetched_at, self.failed_at) = (keys.into(), Some(now), None);
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
        Self { reach, clock, http: OnceLock::new(), known: Mutex::default() }
    }

    /// The keys at an address, for a token that names that key.
    ///
    /// # Errors
    /// [`Unreachable`].
    pub async fn at(&self, url: &JwksUrl, kid: Option<&str>) -> Result<Arc<[PublicKey]>, Unreachable> {
        let known = self.known(url);
        let mut set = known.set.lock().await;
        if set.is_due(kid, self.clock.now()) {
            let fetched = match tokio::time::timeout(PATIENCE, self.fetch(url)).await {
                Ok(fetched) => fetched,
                Err(_) => Err(FetchError::Slow),
            };
            if let Err(error) = &fetched {
                tracing::warn!(jwks.url = %url, "An issuer's keys could not be fetched: {error}");
            }
            set.note(kid, fetched.ok(), self.clock.now());
        }
        set.keys(kid, self.clock.now())
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
        let http = reqwest::Client::builder()
            .dns_resolver(Arc::new(Guarded(self.reach)))
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
    #[error("the address cannot be reached: {0}")]
    Connection(#[source] reqwest::Error),
    #[error("HTTP {0}; redirects are not followed")]
    Status(reqwest::StatusCode),
    #[error("the set is too large")]
    Large,
    #[error("no JSON Web Key Set of at most 64 keys")]
    Malformed,
}

/// Looks names up, and lets only those through that lead where something may be asked: all of a name's
/// addresses, so that it cannot be one now and another then.
struct Guarded(Reach);

impl Resolve for Guarded {
    fn resolve(&self, name: Name) -> Resolving {
        let reach = self.0;
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            if found.iter().any(|address| !reaches(reach, address.ip())) {
                return Err("the name leads where nothing may be asked".into());
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// Whether an address may be asked. What answers at a link's own addresses (AWS's metadata service, the
/// Lambda runtime's neighbours) never may.
fn reaches(reach: Reach, ip: IpAddr) -> bool {
    match (reach, ip) {
        (reach, IpAddr::V6(ip)) => match embedded(ip) {
            Some(v4) => reaches(reach, IpAddr::V4(v4)),
            None if reach == Reach::Internet => public_v6(ip),
            None => {
                !ip.is_unspecified() && !ip.is_multicast() && !ip.is_unicast_link_local() && !metadata(ip)
            }
        },
        (Reach::Internet, IpAddr::V4(ip)) => public_v4(ip),
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

/// The registries of special addresses: <https://www.iana.org/assignments/iana-ipv4-special-registry>.
fn public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    let special = matches!(
        (a, b, c),
        (0 | 10 | 127 | 224.., _, _)
            | (100, 64..=127, _)
            | (169, 254, _)
            | (172, 16..=31, _)
            | (192, 0, 0 | 2)
            | (192, 88, 99)
            | (192, 168, _)
            | (198, 18..=19, _)
            | (198, 51, 100)
            | (203, 0, 113)
    );
    !special
}

/// Global unicast (2000::/3), without what is set apart in it.
fn public_v6(ip: Ipv6Addr) -> bool {
    let [first, second, ..] = ip.segments();
    let global = first & 0xe000 == 0x2000;
    let special = match first {
        // Protocol assignments (2001::/23), documentation, and what tunnels to elsewhere.
        0x2001 => second < 0x0200 || second == 0x0db8,
        0x2002 => true,
        0x3fff => second < 0x1000,
        _ => false,
    };
    global && !special
}

/// The IPv4 address that an IPv6 address stands for: mapped, compatible, or translated (64:ff9b::/96).
fn embedded(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let [a, b, c, d, e, f, high, low] = ip.segments();
    let prefix = [a, b, c, d, e, f];
    let stands = prefix == [0, 0, 0, 0, 0, 0xffff]
        || (prefix == [0; 6] && !ip.is_loopback() && !ip.is_unspecified())
        || prefix == [0x64, 0xff9b, 0, 0, 0, 0];
    stands.then(|| Ipv4Addr::from((u32::from(high) << 16) | u32::from(low)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::issuer::Material;

    fn key(kid: &str) -> PublicKey {
        PublicKey { kid: Some(kid.into()), material: Material::Ed25519 { x: String::new() } }
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

    #[tokio::test]
    async fn few_addresses_are_remembered_and_none_is_asked_out_of_reach() {
        let sets = KeySets::new(Reach::Internet, Clock::fixed(at(0)));
        for n in 0..300 {
            // Written as an address: refused before anything is asked.
            let url = format!("https://10.0.{}.{}/keys", n / 256, n % 256).parse().unwrap();
            assert_eq!(sets.at(&url, None).await, Err(Unreachable));
        }
        assert_eq!(sets.known.lock().unwrap().len(), REMEMBERED);
        assert!(sets.http.get().is_none());
        let local = "https://localhost/keys".parse().unwrap();
        assert_eq!(sets.at(&local, None).await, Err(Unreachable));
    }
}

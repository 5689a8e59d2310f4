//! Addresses that tenants choose: which of them are on the public internet, and so may be connected to. Pure, but
//! for the look-up of names.
//!
//! What stands beside the sender (an instance's metadata, private networks, the machine itself) must not be reached
//! by whoever can name an address. There is one list, for all that is sent to tenants' addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Whether an address is one of the public internet: global unicast, and nothing that is set apart in it. An IPv6
/// address that stands for an IPv4 address is that one.
pub fn holds(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => public_v4(address),
        IpAddr::V6(address) => embedded(address).map_or_else(|| public_v6(address), public_v4),
    }
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
pub fn embedded(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let [a, b, c, d, e, f, high, low] = ip.segments();
    let prefix = [a, b, c, d, e, f];
    let stands = prefix == [0, 0, 0, 0, 0, 0xffff]
        || (prefix == [0; 6] && !ip.is_loopback() && !ip.is_unspecified())
        || prefix == [0x64, 0xff9b, 0, 0, 0, 0];
    stands.then(|| Ipv4Addr::from((u32::from(high) << 16) | u32::from(low)))
}

#[cfg(feature = "internet")]
pub use guarded::{Guarded, Refused};

#[cfg(feature = "internet")]
mod guarded {
    use std::fmt;
    use std::net::{IpAddr, SocketAddr};
    use std::sync::Arc;

    use reqwest::dns::{Addrs, Name, Resolve, Resolving};

    /// Looks names up, and answers with addresses that may be connected to, or with none. The connection is made to
    /// what was answered here, so a name that means something else a moment later changes nothing.
    #[derive(Clone)]
    pub struct Guarded(Arc<dyn Fn(IpAddr) -> bool + Send + Sync>);

    impl Guarded {
        /// One that lets through what is admitted.
        pub fn new(admits: impl Fn(IpAddr) -> bool + Send + Sync + 'static) -> Self {
            Self(Arc::new(admits))
        }
    }

    impl fmt::Debug for Guarded {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Guarded(…)")
        }
    }

    /// A name that leads to where nothing may be asked.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
    #[error("the name leads to an address that may not be spoken to")]
    pub struct Refused;

    impl Resolve for Guarded {
        fn resolve(&self, name: Name) -> Resolving {
            let admits = Arc::clone(&self.0);
            Box::pin(async move {
                let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
                // One bad address is enough: which one is connected to is not ours to say.
                if found.iter().any(|address| !admits(address.ip())) {
                    return Err(Refused.into());
                }
                Ok(Box::new(found.into_iter()) as Addrs)
            })
        }
    }
}

//! Networks that a key may be used from. Pure.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

/// A network, IPv4 or IPv6. An IPv4 address that is written as IPv6 (`::ffff:192.0.2.1`) is that IPv4
/// address, in networks as in what is looked for in them: so no address has two forms, of which one is
/// let in and the other is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Network(IpNet);

/// A text that is no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidNetwork {
    /// It is neither a network nor an address.
    #[error("not a network such as 203.0.113.0/24 or 2001:db8::/32, nor an address")]
    Malformed,
    /// It names an address within the network. Which of the two was meant is not guessed.
    #[error("has bits beyond its prefix; the network is {0}")]
    Beyond(IpNet),
}

impl Network {
    /// Whether an address lies in it.
    pub fn holds(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }

    /// Whether all of another network lies in it.
    pub fn covers(&self, other: &Self) -> bool {
        self.0.contains(&other.0)
    }
}

/// The same network, as IPv4 if all its addresses are that.
fn canonical(network: IpNet) -> IpNet {
    let IpNet::V6(six) = network else { return network };
    let four = six.addr().to_ipv4_mapped().zip(six.prefix_len().checked_sub(96));
    four.and_then(|(address, prefix)| Ipv4Net::new(address, prefix).ok()).map_or(network, IpNet::V4)
}

impl FromStr for Network {
    type Err = InvalidNetwork;

    fn from_str(text: &str) -> Result<Self, InvalidNetwork> {
        // The address by std's parser, which takes no leading zeros: `010.0.0.0` is 8.0.0.0 to some.
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| InvalidNetwork::Malformed)?;
        let network = match prefix {
            None => IpNet::from(address),
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => {
                let prefix = digits.parse().map_err(|_| InvalidNetwork::Malformed)?;
                IpNet::new(address, prefix).map_err(|_| InvalidNetwork::Malformed)?
            }
            Some(_) => return Err(InvalidNetwork::Malformed),
        };
        let network = canonical(network);
        if network.addr() != network.network() {
            return Err(InvalidNetwork::Beyond(network.trunc()));
        }
        Ok(Self(network))
    }
}

impl TryFrom<String> for Network {
    type Error = InvalidNetwork;
    fn try_from(text: String) -> Result<Self, InvalidNetwork> {
        text.parse()
    }
}

impl From<Network> for String {
    fn from(network: Network) -> Self {
        network.to_string()
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> Network {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_lies_in_its_networks_however_it_is_written() {
        for (net, inside, outside) in [
            ("203.0.113.0/24", &["203.0.113.0", "203.0.113.255", "::ffff:203.0.113.7"][..], "203.0.114.0"),
            ("203.0.113.7", &["203.0.113.7", "::ffff:cb00:7107"][..], "203.0.113.8"),
            ("::ffff:203.0.113.0/120", &["203.0.113.9", "::ffff:203.0.113.9"][..], "203.0.112.255"),
            ("2001:db8::/32", &["2001:db8::1", "2001:db8:ffff::"][..], "2001:db9::"),
            ("0.0.0.0/0", &["1.2.3.4", "::ffff:1.2.3.4"][..], "::1"),
            ("::/0", &["::1", "2001:db8::1"][..], "::ffff:1.2.3.4"),
        ] {
            for address in inside {
                assert!(network(net).holds(address.parse().unwrap()), "{address} in {net}");
            }
            assert!(!network(net).holds(outside.parse().unwrap()), "{outside} in {net}");
        }
    }

    #[test]
    fn a_network_covers_what_lies_in_it() {
        assert!(network("10.0.0.0/8").covers(&network("10.1.0.0/16")));
        assert!(network("10.0.0.0/8").covers(&network("10.0.0.0/8")));
        assert!(!network("10.1.0.0/16").covers(&network("10.0.0.0/8")));
        assert!(!network("::/0").covers(&network("10.0.0.0/8")));
    }

    #[test]
    fn what_is_none_is_refused_and_never_mended() {
        for bad in [
            "",
            "10.0.0.0/33",
            "10.0.0/8",
            "010.0.0.0/8",
            "10.0.0.0/-1",
            "10.0.0.0/8 ",
            "2001:db8::/129",
            "example.com",
            "10.0.0.0/255.0.0.0",
            "fe80::1%eth0",
            "*",
            "10.0.0.0/8,11.0.0.0/8",
            "::ffff:10.0.0.0/95",
        ] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
        let error = "10.1.2.3/8".parse::<Network>().unwrap_err();
        assert!(error.to_string().contains("10.0.0.0/8"), "{error}");
        assert_eq!(network("::ffff:10.0.0.0/104").to_string(), "10.0.0.0/8");
        assert_eq!(network("10.0.0.1").to_string(), "10.0.0.1/32");
        assert_eq!(network("2001:DB8::").to_string(), "2001:db8::/128");
        assert_eq!(serde_json::to_string(&network("10.0.0.0/8")).unwrap(), "\"10.0.0.0/8\"");
    }
}

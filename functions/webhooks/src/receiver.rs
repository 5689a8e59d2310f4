//! Speaking to a receiver, whose address a tenant chose: to the public internet alone, for a bounded time,
//! and without believing a word of the answer but its status.

use std::net::IpAddr;
use std::time::Duration;

use reqwest::redirect::Policy;
use reqwest::{Client, StatusCode, Url};
use shared::cause;
use shared::internet::{Guarded, Refused};
use shared::roots::{self, RootsError};
use shared::webhook::{Receivers, SIGNATURE};

/// How long a try may take, with everything.
const PATIENCE: Duration = Duration::from_secs(5);

/// The client of all receivers.
#[derive(Debug)]
pub(crate) struct Sender {
    http: Client,
    receivers: Receivers,
}

/// What a receiver made of a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It has it.
    Taken,
    /// It wants none, now or later.
    Unwanted,
    /// Nothing, and why. Never the address, which may hold the receiver's own secret.
    Failed(String),
}

impl Sender {
    /// For these receivers.
    ///
    /// # Errors
    /// If the roots cannot be had, or the TLS library does not start.
    pub(crate) fn new(receivers: Receivers) -> Result<Self, RootsError> {
        let http = Client::builder()
            .tls_backend_preconfigured(roots::outbound()?)
            .dns_resolver(Guarded::new(move |address| receivers.admit(address)))
            // A redirect would lead to where nobody has looked, and a proxy would look up the name itself.
            .redirect(Policy::none())
            .no_proxy()
            .referer(false)
            .https_only(receivers == Receivers::Public)
            .timeout(PATIENCE)
            // Messages are few; a connection that is kept is one more that may be stale.
            .pool_max_idle_per_host(0)
            .user_agent("bulkhead")
            .build()?;
        Ok(Self { http, receivers })
    }

    /// Tries to deliver a body.
    pub(crate) async fn send(&self, url: &str, body: String, signature: String) -> Answer {
        let Some(url) = self.checked(url) else {
            return Answer::Failed("the address is none that may be spoken to".to_owned());
        };
        let request = self
            .http
            .post(url)
            .header("content-type", "application/json")
            .header(SIGNATURE, signature)
            .body(body);
        // The body of the answer is not read.
        match request.send().await {
            Ok(response) if response.status().is_success() => Answer::Taken,
            Ok(response) if response.status() == StatusCode::GONE => Answer::Unwanted,
            Ok(response) => Answer::Failed(format!("HTTP {}", response.status().as_u16())),
            Err(error) if error.is_timeout() => Answer::Failed("no answer in time".to_owned()),
            Err(error) if cause::find::<Refused>(&error).is_some() => {
                Answer::Failed("the address is none that may be spoken to".to_owned())
            }
            Err(_) => Answer::Failed("it cannot be reached".to_owned()),
        }
    }

    /// The address, if it may be spoken to as far as it can be seen before names are looked up: a number in
    /// the place of a name is not looked up at all.
    fn checked(&self, url: &str) -> Option<Url> {
        let url: Url = url.parse().ok()?;
        let host = url.host_str()?;
        let number: Option<IpAddr> = host.trim_start_matches('[').trim_end_matches(']').parse().ok();
        let scheme =
            url.scheme() == "https" || (url.scheme() == "http" && self.receivers == Receivers::Loopback);
        (scheme && number.is_none_or(|address| self.receivers.admit(address))).then_some(url)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn tried(receivers: Receivers, url: &str) -> Answer {
        Sender::new(receivers).unwrap().send(url, "{}".to_owned(), "t=1".to_owned()).await
    }

    #[tokio::test]
    async fn addresses_that_are_no_public_ones_are_refused_before_a_byte_is_sent() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let refused = Answer::Failed("the address is none that may be spoken to".to_owned());
        for host in [
            "127.0.0.1",
            "localhost",
            "2130706433",
            "0x7f.1",
            "0",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "169.254.169.254",
            "10.0.0.1",
            "[fd00:ec2::254]",
        ] {
            assert_eq!(tried(Receivers::Public, &format!("https://{host}:{port}/")).await, refused, "{host}");
        }
        for url in ["http://example.com/", "ftp://example.com/", "file:///etc/passwd", "", "https://"] {
            assert_eq!(tried(Receivers::Public, url).await, refused, "{url}");
        }
        for url in ["http://169.254.169.254/latest/", "http://[fd00:ec2::254]/", "http://192.168.0.1/"] {
            assert_eq!(tried(Receivers::Loopback, url).await, refused, "{url}");
        }
        let nobody = tokio::time::timeout(Duration::from_millis(50), listener.accept()).await;
        assert!(nobody.is_err(), "somebody connected");
    }
}

//! How often and when to try again: bounded, exponential, with full jitter.
//!
//! <https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/>

use std::time::Duration;

use rand::{CryptoRng, RngExt};

/// A policy for calls that may be repeated safely.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// How often a call is made at the most.
    pub attempts: u32,
    /// The longest wait before the second attempt; it doubles with each further one.
    pub base: Duration,
    /// The longest wait before any attempt, a server's `retry-after` included: a server that wants
    /// longer is not waited for.
    pub cap: Duration,
}

impl Backoff {
    /// How long to wait after `failed` attempts (at least 1), or `None` if it is time to give up.
    /// `asked` is what the server asked for, which is honoured.
    pub fn wait(&self, failed: u32, asked: Option<Duration>, rng: &mut impl CryptoRng) -> Option<Duration> {
        if failed >= self.attempts {
            return None;
        }
        match asked {
            Some(asked) if asked > self.cap => None,
            Some(asked) => Some(asked),
            None => {
                let ceiling = self.base.saturating_mul(1 << (failed - 1).min(16)).min(self.cap);
                Some(ceiling.mul_f64(rng.random_range(0.0..1.0)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::entropy;

    #[test]
    fn waits_grow_are_capped_and_end() {
        let policy =
            Backoff { attempts: 4, base: Duration::from_millis(100), cap: Duration::from_millis(250) };
        let mut rng = entropy();
        for _ in 0..200 {
            assert!(policy.wait(1, None, &mut rng).unwrap() <= Duration::from_millis(100));
            assert!(policy.wait(2, None, &mut rng).unwrap() <= Duration::from_millis(200));
            assert!(policy.wait(3, None, &mut rng).unwrap() <= Duration::from_millis(250));
        }
        assert_eq!(policy.wait(4, None, &mut rng), None);
    }

    #[test]
    fn a_servers_wish_is_honoured_or_not_waited_for() {
        let policy = Backoff { attempts: 3, base: Duration::from_millis(1), cap: Duration::from_secs(2) };
        let mut rng = entropy();
        assert_eq!(policy.wait(1, Some(Duration::from_secs(1)), &mut rng), Some(Duration::from_secs(1)));
        assert_eq!(policy.wait(1, Some(Duration::from_secs(3)), &mut rng), None);
    }
}

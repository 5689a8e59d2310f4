//! Which prompt prefixes have been seen lately.

use std::collections::HashMap;

use sha2::{Digest as _, Sha256};
use time::{Duration, OffsetDateTime};

use super::request::{Request, Ttl};

/// Shorter prefixes are silently not cached.
const LEAST_TOKENS: u64 = 1_024;
/// How many blocks before a breakpoint an earlier prefix is looked for.
const LOOK_BACK: usize = 20;
/// Beyond this many prefixes those that run out first go.
const MOST_ENTRIES: usize = 10_000;

/// How the tokens of a prompt are billed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Input {
    pub(super) fresh: u64,
    pub(super) written_5m: u64,
    pub(super) written_1h: u64,
    pub(super) read: u64,
}

impl Input {
    pub(super) fn total(self) -> u64 {
        self.fresh + self.written_5m + self.written_1h + self.read
    }
}

#[derive(Default)]
pub(super) struct Cache(HashMap<[u8; 32], (OffsetDateTime, Ttl)>);

fn lifetime(ttl: Ttl) -> Duration {
    match ttl {
        Ttl::FiveMinutes => Duration::minutes(5),
        Ttl::Hour => Duration::hours(1),
    }
}

impl Cache {
    /// Accounts for a prompt and remembers its prefixes. `owner` keeps accounts apart.
    pub(super) fn account(&mut self, owner: &str, request: &Request, now: OffsetDateTime) -> Input {
        let mut chain = Sha256::new().chain_update(owner).chain_update([0]).chain_update(&request.model);
        let mut total = 0;
        let prefixes: Vec<([u8; 32], u64)> = request
            .units
            .iter()
            .map(|unit| {
                chain.update(unit.digest);
                total += unit.tokens;
                (chain.clone().finalize().into(), total)
            })
            .collect();
        self.0.retain(|_, (until, _)| *until > now);

        let breakpoints: Vec<(usize, Ttl)> =
            request.units.iter().enumerate().filter_map(|(n, unit)| Some((n, unit.breakpoint?))).collect();
        let mut read = 0;
        for (at, _) in &breakpoints {
            for (digest, tokens) in prefixes.iter().take(at + 1).rev().take(LOOK_BACK) {
                if let Some((until, ttl)) = self.0.get_mut(digest) {
                    // Reading refreshes.
                    *until = now.saturating_add(lifetime(*ttl));
                    read = read.max(*tokens);
                    break;
                }
            }
        }
        let mut input = Input { read, ..Input::default() };
        let mut covered = read;
        for (at, ttl) in breakpoints {
            let Some((digest, tokens)) = prefixes.get(at) else { continue };
            if *tokens < LEAST_TOKENS {
                continue;
            }
            let written = tokens.saturating_sub(covered);
            match ttl {
                Ttl::FiveMinutes => input.written_5m += written,
                Ttl::Hour => input.written_1h += written,
            }
            covered = covered.max(*tokens);
            self.0.entry(*digest).or_insert((now.saturating_add(lifetime(ttl)), ttl));
        }
        if self.0.len() > MOST_ENTRIES {
            let mut ends: Vec<OffsetDateTime> = self.0.values().map(|(until, _)| *until).collect();
            ends.sort_unstable();
            if let Some(end) = ends.get(ends.len() - MOST_ENTRIES) {
                self.0.retain(|_, (until, _)| *until > *end);
            }
        }
        input.fresh = total - covered;
        input
    }
}

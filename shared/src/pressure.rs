//! Pressure on a model account that many tenants share: as it fills, the lower tiers make room first.
//! Pure; [`crate::aws::accounts`] keeps what instances note, [`crate::valve`] acts on it.

use crate::clock::Timestamp;
use crate::tenant::Tier;

/// How long a note about what is left of the account's own limits is believed, in milliseconds: they
/// fill up again all the time.
const FRESH_MS: i64 = 5_000;
/// How long an overloaded service is left alone if it does not say, in milliseconds.
const OVERLOADED_MS: u64 = 2_000;
/// And at most, whatever it says.
const MOST_OVERLOADED_MS: u64 = 60_000;

/// How full an account is, in thousandths: 1000 is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fill(pub u32);

/// What one instance has noted about an account.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// Calls in flight: when each ends at the latest, in seconds.
    pub calls: Vec<i64>,
    /// How full the account's own limits are, and until when that is believed.
    pub limits: Option<(Fill, Timestamp)>,
    /// Until when the service asked to be left alone.
    pub overloaded_until: Option<Timestamp>,
}

/// What all instances have noted about an account.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Their notes.
    pub notes: Vec<Notes>,
    /// The most calls that may be in flight, if that is bounded.
    pub ceiling: Option<u32>,
}

impl Account {
    /// How full the account is.
    pub fn fill(&self, now: Timestamp) -> Fill {
        let calls = self.notes.iter().flat_map(|n| &n.calls).filter(|end| **end > now.as_seconds()).count();
        let by_ceiling = self.ceiling.map(|most| {
            let share = calls.saturating_mul(1_000) / (most.max(1) as usize);
            Fill(u32::try_from(share).unwrap_or(u32::MAX))
        });
        let by_limits = self
            .notes
            .iter()
            .filter_map(|n| n.limits)
            .filter(|(_, until)| now < *until)
            .map(|(fill, _)| fill);
        let overloaded = self.overloaded_until(now).map(|_| Fill(1_000));
        by_ceiling.into_iter().chain(by_limits).chain(overloaded).max().unwrap_or_default()
    }

    /// Until when the service asked to be left alone, if it did.
    pub fn overloaded_until(&self, now: Timestamp) -> Option<Timestamp> {
        self.notes.iter().filter_map(|n| n.overloaded_until).filter(|until| now < *until).max()
    }
}

impl Tier {
    /// How full the account may be for a request of this tier to go ahead. Enterprise requests wait at
    /// a full account, and then go ahead all the same: what room there is is theirs.
    pub const fn goes_ahead_below(self) -> Fill {
        Fill(match self {
            Self::Free => 700,
            Self::Starter => 800,
            Self::Professional => 900,
            Self::Enterprise => 1_000,
        })
    }
}

/// What an answer of the service says about its limits: the fullest of them, if it names any.
///
/// <https://platform.claude.com/docs/en/api/rate-limits#response-headers>
pub fn fill_of(headers: &http::HeaderMap) -> Option<Fill> {
    let number = |kind: &str, what: &str| {
        let value = headers.get(format!("anthropic-ratelimit-{kind}-{what}"))?;
        value.to_str().ok()?.parse::<u64>().ok()
    };
    let fills = ["requests", "tokens", "input-tokens", "output-tokens"].into_iter().filter_map(|kind| {
        let (limit, remaining) = (number(kind, "limit")?, number(kind, "remaining")?);
        let used = limit.checked_sub(remaining)?.saturating_mul(1_000).checked_div(limit)?;
        u32::try_from(used).ok().map(Fill)
    });
    fills.max()
}

/// Until when a note about limits made now is believed.
pub const fn believed_until(now: Timestamp) -> Timestamp {
    now.plus_millis(FRESH_MS)
}

/// Until when a service is left alone that says now that it is overloaded.
pub fn left_alone_until(now: Timestamp, retry_after_ms: Option<u64>) -> Timestamp {
    now.plus_millis(retry_after_ms.unwrap_or(OVERLOADED_MS).min(MOST_OVERLOADED_MS) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_795_000_000_000);

    #[test]
    fn the_fullest_measure_counts_and_none_outlives_its_time() {
        let calls = vec![NOW.as_seconds() + 9; 8];
        let mut account = Account { notes: vec![Notes { calls, ..Notes::default() }], ceiling: Some(10) };
        assert_eq!(account.fill(NOW), Fill(800));
        assert_eq!(account.fill(NOW.plus_millis(9_000)), Fill(0));
        let limits = Some((Fill(950), believed_until(NOW)));
        account.notes.push(Notes { limits, ..Notes::default() });
        assert_eq!(account.fill(NOW), Fill(950));
        account.notes.push(Notes { overloaded_until: Some(left_alone_until(NOW, None)), ..Notes::default() });
        assert_eq!(account.fill(NOW), Fill(1_000));
        assert_eq!(account.fill(NOW.plus_millis(2_001)), Fill(950));
        assert_eq!(account.fill(NOW.plus_millis(5_001)), Fill(800));
        assert_eq!(Account::default().fill(NOW), Fill(0));
    }

    #[test]
    fn lower_tiers_make_room_first() {
        let tiers = [Tier::Free, Tier::Starter, Tier::Professional, Tier::Enterprise];
        assert!(tiers.windows(2).all(|pair| pair[0].goes_ahead_below() < pair[1].goes_ahead_below()));
    }

    #[test]
    fn the_services_own_headers_are_read() {
        let mut headers = http::HeaderMap::new();
        assert_eq!(fill_of(&headers), None);
        headers.insert("anthropic-ratelimit-requests-limit", "1000".parse().unwrap());
        headers.insert("anthropic-ratelimit-requests-remaining", "900".parse().unwrap());
        headers.insert("anthropic-ratelimit-input-tokens-limit", "50000".parse().unwrap());
        headers.insert("anthropic-ratelimit-input-tokens-remaining", "5000".parse().unwrap());
        headers.insert("anthropic-ratelimit-output-tokens-limit", "0".parse().unwrap());
        headers.insert("anthropic-ratelimit-output-tokens-remaining", "0".parse().unwrap());
        assert_eq!(fill_of(&headers), Some(Fill(900)));
    }
}

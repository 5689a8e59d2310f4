//! Time as a parameter.
//!
//! Nothing in the domain reads the system's clock: whoever needs the time is given a [`Clock`] or a
//! [`Timestamp`], so that a test can hold time still and a run can be repeated.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// An instant, UTC, in milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The instant `ms` milliseconds after the Unix epoch.
    pub const fn from_millis(ms: i64) -> Self {
        Self(ms)
    }

    /// Milliseconds since the Unix epoch.
    pub const fn as_millis(self) -> i64 {
        self.0
    }

    /// Whole seconds since the Unix epoch, rounded down: the unit of DynamoDB's TTL and of a JWT's `exp`.
    pub const fn as_seconds(self) -> i64 {
        self.0.div_euclid(1_000)
    }

    /// This instant plus `ms` milliseconds, saturating.
    pub const fn plus_millis(self, ms: i64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    /// This instant plus `days` days of 24 hours, saturating.
    pub const fn plus_days(self, days: u32) -> Self {
        self.plus_millis(days as i64 * 86_400_000)
    }

    /// Milliseconds from `earlier` to this instant; zero if it lies in the future.
    pub const fn millis_since(self, earlier: Self) -> u64 {
        let elapsed = self.0.saturating_sub(earlier.0);
        if elapsed < 0 { 0 } else { elapsed as u64 }
    }

    /// This instant as a calendar value. The few instants outside the calendar's range become the epoch.
    pub fn to_datetime(self) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.0) * 1_000_000)
            .unwrap_or(OffsetDateTime::UNIX_EPOCH)
    }

    /// Parses RFC 3339, as [`fmt::Display`] writes it. Finer than a millisecond is cut.
    ///
    /// # Errors
    /// If `text` is not an RFC 3339 date and time.
    pub fn parse(text: &str) -> Result<Self, time::error::Parse> {
        let parsed = OffsetDateTime::parse(text, &Rfc3339)?;
        let ms = parsed.unix_timestamp_nanos().div_euclid(1_000_000);
        Ok(Self(i64::try_from(ms).unwrap_or(i64::MAX)))
    }
}

/// RFC 3339 in UTC, always with three decimals, so that text order is time order.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let t = self.to_datetime();
        write!(
            f,
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
            t.year(),
            u8::from(t.month()),
            t.day(),
            t.hour(),
            t.minute(),
            t.second(),
            t.millisecond()
        )
    }
}

/// An instant as text, for serde.
pub(crate) mod rfc3339 {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Timestamp;

    pub(crate) fn serialize<S: Serializer>(at: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(at)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
        Timestamp::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }

    /// The same where there may be none.
    pub(crate) mod option {
        use serde::de::Error;
        use serde::{Deserialize, Deserializer, Serializer};

        use super::Timestamp;

        pub(crate) fn serialize<S: Serializer>(
            at: &Option<Timestamp>,
            serializer: S,
        ) -> Result<S::Ok, S::Error> {
            match at {
                Some(at) => serializer.collect_str(at),
                None => serializer.serialize_none(),
            }
        }

        pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
            deserializer: D,
        ) -> Result<Option<Timestamp>, D::Error> {
            let text = Option::<String>::deserialize(deserializer)?;
            text.map(|text| Timestamp::parse(&text).map_err(D::Error::custom)).transpose()
        }
    }
}

/// Where the time comes from.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Timestamp + Send + Sync>);

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self(Arc::new(|| {
            #[expect(clippy::disallowed_methods, reason = "the one place where the system's clock is read")]
            let now = OffsetDateTime::now_utc();
            let ms = now.unix_timestamp_nanos().div_euclid(1_000_000);
            Timestamp(i64::try_from(ms).unwrap_or(i64::MAX))
        }))
    }

    /// A clock that stands still at `at`.
    pub fn fixed(at: Timestamp) -> Self {
        Self(Arc::new(move || at))
    }

    /// The present instant.
    pub fn now(&self) -> Timestamp {
        (self.0)()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_three_decimals_and_parses_back() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (1_790_000_000_007, "2026-09-21T14:13:20.007Z"),
            (-1, "1969-12-31T23:59:59.999Z"),
        ] {
            let at = Timestamp::from_millis(ms);
            assert_eq!(at.to_string(), text);
            assert_eq!(Timestamp::parse(text).unwrap(), at);
        }
    }

    #[test]
    fn elapsed_time_is_never_negative() {
        let early = Timestamp::from_millis(5);
        assert_eq!(early.millis_since(early.plus_millis(10)), 0);
        assert_eq!(early.plus_millis(10).millis_since(early), 10);
    }
}

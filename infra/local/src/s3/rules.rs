//! Object Lock: what may be deleted and which retention may follow which. Values in, values out.

use serde::{Deserialize, Serialize};
use time::{Duration, OffsetDateTime};

/// How strictly a version is retained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum Mode {
    Governance,
    Compliance,
}

impl Mode {
    pub(super) fn parse(text: &str) -> Option<Self> {
        match text {
            "GOVERNANCE" => Some(Self::Governance),
            "COMPLIANCE" => Some(Self::Compliance),
            _ => None,
        }
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Governance => "GOVERNANCE",
            Self::Compliance => "COMPLIANCE",
        }
    }
}

/// A version's retention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Retention {
    pub(super) mode: Mode,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) until: OffsetDateTime,
}

impl Retention {
    fn holds(self, now: OffsetDateTime) -> bool {
        self.until > now
    }
}

/// A bucket's default retention. A year is 365 days, as in S3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DefaultRetention {
    pub(super) mode: Mode,
    pub(super) period: Period,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Period {
    Days(u16),
    Years(u16),
}

impl DefaultRetention {
    pub(super) fn starting(self, created: OffsetDateTime) -> Retention {
        let days = match self.period {
            Period::Days(days) => i64::from(days),
            Period::Years(years) => i64::from(years) * 365,
        };
        Retention { mode: self.mode, until: created.saturating_add(Duration::days(days)) }
    }
}

/// Everything that protects one version. A legal hold that was never set differs from one that was
/// lifted: S3 answers the first with an error.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Protection {
    pub(super) retention: Option<Retention>,
    pub(super) legal_hold: Option<bool>,
}

/// The version is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Protected;

/// May this version be deleted for good?
pub(super) fn delete(protection: Protection, bypass: bool, now: OffsetDateTime) -> Result<(), Protected> {
    if protection.legal_hold == Some(true) {
        return Err(Protected);
    }
    match protection.retention {
        Some(retention) if retention.holds(now) => match retention.mode {
            Mode::Compliance => Err(Protected),
            Mode::Governance if bypass => Ok(()),
            Mode::Governance => Err(Protected),
        },
        _ => Ok(()),
    }
}

/// May `new` replace `current`? `None` removes it.
pub(super) fn replace(
    current: Option<Retention>,
    new: Option<Retention>,
    bypass: bool,
    now: OffsetDateTime,
) -> Result<(), Protected> {
    let Some(current) = current.filter(|current| current.holds(now)) else {
        return Ok(());
    };
    let extends = new.is_some_and(|new| new.mode == current.mode && new.until >= current.until);
    match current.mode {
        _ if extends => Ok(()),
        Mode::Governance if bypass => Ok(()),
        Mode::Governance | Mode::Compliance => Err(Protected),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    fn retention(mode: Mode, seconds: i64) -> Option<Retention> {
        Some(Retention { mode, until: NOW + Duration::seconds(seconds) })
    }

    #[test]
    fn deletion_follows_mode_hold_bypass_and_expiry() {
        for (mode, seconds, hold, bypass, allowed) in [
            (Mode::Compliance, 1, None, false, false),
            (Mode::Compliance, 1, None, true, false),
            (Mode::Compliance, 0, None, false, true),
            (Mode::Governance, 1, None, false, false),
            (Mode::Governance, 1, None, true, true),
            (Mode::Governance, 1, Some(true), true, false),
            (Mode::Governance, 0, Some(true), true, false),
            (Mode::Governance, 0, Some(false), false, true),
        ] {
            let protection = Protection { retention: retention(mode, seconds), legal_hold: hold };
            assert_eq!(
                delete(protection, bypass, NOW).is_ok(),
                allowed,
                "{mode:?} for {seconds} s, hold {hold:?}, bypass {bypass}"
            );
        }
        assert_eq!(delete(Protection::default(), false, NOW), Ok(()));
    }

    #[test]
    fn retention_only_grows() {
        use Mode::{Compliance, Governance};
        for (current, new, bypass, allowed) in [
            (None, retention(Compliance, 9), false, true),
            (retention(Compliance, 5), retention(Compliance, 5), false, true),
            (retention(Compliance, 5), retention(Compliance, 6), false, true),
            (retention(Compliance, 5), retention(Compliance, 4), true, false),
            (retention(Compliance, 5), retention(Governance, 9), true, false),
            (retention(Compliance, 5), None, true, false),
            (retention(Compliance, 0), None, false, true),
            (retention(Governance, 5), retention(Governance, 6), false, true),
            (retention(Governance, 5), retention(Governance, 4), false, false),
            (retention(Governance, 5), retention(Governance, 4), true, true),
            (retention(Governance, 5), retention(Compliance, 6), false, false),
            (retention(Governance, 5), retention(Compliance, 6), true, true),
            (retention(Governance, 5), None, false, false),
            (retention(Governance, 5), None, true, true),
        ] {
            assert_eq!(
                replace(current, new, bypass, NOW).is_ok(),
                allowed,
                "{current:?} to {new:?}, bypass {bypass}"
            );
        }
    }
}

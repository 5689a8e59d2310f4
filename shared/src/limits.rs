//! What a tenant may use: the tiers' defaults, and how an operator changes them for one tenant.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::marker::PhantomData;
use std::sync::LazyLock;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::clock::Timestamp;
use crate::pricing;
use crate::tenant::Tier;

/// Every limit of a tenant. All are present in a tenant's record; a record that lacks one does not
/// parse, so a missing limit refuses and never means "unlimited". Zero means zero.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Requests in any 60 seconds.
    pub requests_per_minute: u32,
    /// Tokens, input and output, in a UTC day.
    pub tokens_per_day: u64,
    /// Tokens, input and output, in a UTC calendar month.
    pub monthly_token_budget: u64,
    /// Tokens of one model call: instructions, passages, history, question and answer together.
    pub max_context_tokens: u64,
    /// Requests at the same time.
    pub max_concurrent: u32,
    /// The models that may be asked for.
    pub allowed_models: Vec<String>,
    /// The model that answers where none is asked for.
    pub default_model: String,
    /// Days that conversations and documents are kept.
    pub data_retention_days: u32,
    /// Documents at the same time.
    pub max_documents: u64,
}

/// An operator's changes to a tier's defaults. A tenant's record keeps them apart from the limits that
/// come of them, so that they stay when its tier changes and everything else moves with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, remote = "Self")]
#[expect(missing_docs, reason = "each field is the one of the same name in `Limits`")]
pub struct LimitChanges {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_day: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monthly_token_budget: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_context_tokens: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_concurrent: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_models: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_model: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_retention_days: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_documents: Option<u64>,
}

/// What is to become of an operator's changes: a value takes the place of the one before, `null` goes
/// back to the tier's own, and what is not named stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, remote = "Self")]
#[expect(missing_docs, reason = "each field is the one of the same name in `Limits`")]
pub struct LimitEdits {
    #[serde(default, deserialize_with = "named")]
    pub requests_per_minute: Option<Option<u32>>,
    #[serde(default, deserialize_with = "named")]
    pub tokens_per_day: Option<Option<u64>>,
    #[serde(default, deserialize_with = "named")]
    pub monthly_token_budget: Option<Option<u64>>,
    #[serde(default, deserialize_with = "named")]
    pub max_context_tokens: Option<Option<u64>>,
    #[serde(default, deserialize_with = "named")]
    pub max_concurrent: Option<Option<u32>>,
    #[serde(default, deserialize_with = "named")]
    pub allowed_models: Option<Option<Vec<String>>>,
    #[serde(default, deserialize_with = "named")]
    pub default_model: Option<Option<String>>,
    #[serde(default, deserialize_with = "named")]
    pub data_retention_days: Option<Option<u32>>,
    #[serde(default, deserialize_with = "named")]
    pub max_documents: Option<Option<u64>>,
}

/// A field that is there, whatever it holds: for [`LimitEdits`] and its like, where `null` is not the
/// same as nothing.
///
/// # Errors
/// If the field's value is not of its type.
pub fn named<'de, T: Deserialize<'de>, D: Deserializer<'de>>(field: D) -> Result<Option<T>, D::Error> {
    T::deserialize(field).map(Some)
}

/// Reads a struct from an object alone: serde would also take a list of its fields' values.
struct Object<T>(PhantomData<T>);

impl<'de, T: FromObject<'de>> Visitor<'de> for Object<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::from_object(MapAccessDeserializer::new(map))
    }
}

trait FromObject<'de>: Sized {
    fn from_object<D: Deserializer<'de>>(object: D) -> Result<Self, D::Error>;
}

impl<'de> FromObject<'de> for LimitChanges {
    fn from_object<D: Deserializer<'de>>(object: D) -> Result<Self, D::Error> {
        Self::deserialize(object)
    }
}

impl<'de> FromObject<'de> for LimitEdits {
    fn from_object<D: Deserializer<'de>>(object: D) -> Result<Self, D::Error> {
        Self::deserialize(object)
    }
}

impl<'de> Deserialize<'de> for LimitChanges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Object(PhantomData))
    }
}

impl<'de> Deserialize<'de> for LimitEdits {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Object(PhantomData))
    }
}

impl Serialize for LimitChanges {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl LimitChanges {
    /// These changes with `edits` made.
    #[must_use]
    pub fn edited(mut self, edits: LimitEdits) -> Self {
        fn edit<T>(held: &mut Option<T>, edit: Option<Option<T>>) {
            if let Some(value) = edit {
                *held = value;
            }
        }
        edit(&mut self.requests_per_minute, edits.requests_per_minute);
        edit(&mut self.tokens_per_day, edits.tokens_per_day);
        edit(&mut self.monthly_token_budget, edits.monthly_token_budget);
        edit(&mut self.max_context_tokens, edits.max_context_tokens);
        edit(&mut self.max_concurrent, edits.max_concurrent);
        edit(&mut self.allowed_models, edits.allowed_models);
        edit(&mut self.default_model, edits.default_model);
        edit(&mut self.data_retention_days, edits.data_retention_days);
        edit(&mut self.max_documents, edits.max_documents);
        self
    }
}

/// A limit that cannot be set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("limits.{field}: {reason}")]
pub struct InvalidLimit {
    /// The field.
    pub field: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

static TIERS: LazyLock<HashMap<Tier, Limits>> = LazyLock::new(|| {
    #[expect(clippy::expect_used, reason = "a file of this crate, parsed by a test")]
    serde_json::from_str(include_str!("../data/tiers.json")).expect("tiers.json is well-formed")
});

impl Limits {
    /// The tier's defaults, from `data/tiers.json`.
    ///
    /// # Panics
    /// Never: a test shows that the file has every tier.
    pub fn of_tier(tier: Tier) -> Self {
        #[expect(clippy::expect_used, reason = "a file of this crate, checked by a test")]
        TIERS.get(&tier).cloned().expect("tiers.json has every tier")
    }

    /// What was written then, or before, is past its retention: nobody is shown it any more, whatever the
    /// limit was when it was written.
    pub fn retained_since(&self, now: Timestamp) -> Timestamp {
        now.plus_millis(-i64::from(self.data_retention_days) * 86_400_000)
    }

    /// These limits with `changes` made.
    ///
    /// # Errors
    /// [`InvalidLimit`] names the first field that holds an absurd value or an unknown model.
    pub fn with(mut self, changes: LimitChanges) -> Result<Self, InvalidLimit> {
        /// Beyond any account's means, and far from where sums could overflow.
        const MOST_TOKENS: u64 = 1_000_000_000_000;
        // A tenant's requests all pass its one meter, an item that takes about 500 writes a second beside
        // as many settles: beyond this the meter would refuse what the limit allows.
        set("requests_per_minute", &mut self.requests_per_minute, changes.requests_per_minute, 20_000)?;
        set("tokens_per_day", &mut self.tokens_per_day, changes.tokens_per_day, MOST_TOKENS)?;
        set(
            "monthly_token_budget",
            &mut self.monthly_token_budget,
            changes.monthly_token_budget,
            MOST_TOKENS,
        )?;
        set("max_context_tokens", &mut self.max_context_tokens, changes.max_context_tokens, 10_000_000)?;
        // A lease in the meter takes about 70 bytes, and a write of it a unit for each kilobyte.
        set("max_concurrent", &mut self.max_concurrent, changes.max_concurrent, 200)?;
        set("data_retention_days", &mut self.data_retention_days, changes.data_retention_days, 3_650)?;
        set("max_documents", &mut self.max_documents, changes.max_documents, 100_000_000)?;
        if let Some(models) = changes.allowed_models {
            self.allowed_models = models;
        }
        if let Some(model) = changes.default_model {
            self.default_model = model;
        }
        let mut named = HashSet::new();
        if self.allowed_models.is_empty() {
            return Err(InvalidLimit { field: "allowed_models", reason: "it names no model".to_owned() });
        }
        for model in &self.allowed_models {
            if !named.insert(model) {
                let reason = format!("`{model}` is named twice");
                return Err(InvalidLimit { field: "allowed_models", reason });
            }
            if pricing::chat_model(model).is_none() {
                let reason = format!("`{model}` is not a model that has a price");
                return Err(InvalidLimit { field: "allowed_models", reason });
            }
        }
        if !self.allowed_models.contains(&self.default_model) {
            let reason = format!("`{}` is not among allowed_models", self.default_model);
            return Err(InvalidLimit { field: "default_model", reason });
        }
        Ok(self)
    }
}

fn set<T: Copy + PartialOrd + fmt::Display>(
    field: &'static str,
    limit: &mut T,
    change: Option<T>,
    most: T,
) -> Result<(), InvalidLimit> {
    match change {
        Some(value) if value > most => {
            Err(InvalidLimit { field, reason: format!("{value} is more than {most}") })
        }
        Some(value) => {
            *limit = value;
            Ok(())
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tier_has_limits_that_may_be_set() {
        for tier in [Tier::Free, Tier::Starter, Tier::Professional, Tier::Enterprise] {
            let limits = Limits::of_tier(tier);
            assert_eq!(limits.clone().with(LimitChanges::default()), Ok(limits));
        }
    }

    #[test]
    fn absurd_limits_are_refused_by_name_and_zero_is_zero() {
        let free = || Limits::of_tier(Tier::Free);
        let absurd = LimitChanges { tokens_per_day: Some(u64::MAX), ..Default::default() };
        assert_eq!(free().with(absurd).unwrap_err().field, "tokens_per_day");
        let unknown = LimitChanges { allowed_models: Some(vec!["gpt-2".into()]), ..Default::default() };
        assert_eq!(free().with(unknown).unwrap_err().field, "allowed_models");
        let outside = LimitChanges { default_model: Some("claude-opus-4-6".into()), ..Default::default() };
        assert_eq!(free().with(outside).unwrap_err().field, "default_model");
        let none = LimitChanges { requests_per_minute: Some(0), ..Default::default() };
        assert_eq!(free().with(none).unwrap().requests_per_minute, 0);
    }

    #[test]
    fn an_edit_sets_takes_back_or_leaves_alone() {
        let held = LimitChanges { tokens_per_day: Some(5), max_concurrent: Some(2), ..Default::default() };
        let edits = serde_json::from_str(r#"{"tokens_per_day":null,"max_documents":7}"#).unwrap();
        let edited = held.edited(edits);
        let wanted = LimitChanges { max_concurrent: Some(2), max_documents: Some(7), ..Default::default() };
        assert_eq!(edited, wanted);
        assert_eq!(serde_json::to_string(&edited).unwrap(), r#"{"max_concurrent":2,"max_documents":7}"#);
        assert!(serde_json::from_str::<LimitEdits>(r#"{"colour":null}"#).is_err());
        // With another tier, what was set stays, and everything else is that tier's.
        let limits = Limits::of_tier(Tier::Enterprise).with(edited).unwrap();
        assert_eq!((limits.max_concurrent, limits.max_documents), (2, 7));
        assert_eq!(limits.tokens_per_day, Limits::of_tier(Tier::Enterprise).tokens_per_day);
    }

    #[test]
    fn a_record_without_a_limit_does_not_parse() {
        let mut record = serde_json::to_value(Limits::of_tier(Tier::Free)).unwrap();
        assert!(serde_json::from_value::<Limits>(record.clone()).is_ok());
        record.as_object_mut().unwrap().remove("max_concurrent");
        assert!(serde_json::from_value::<Limits>(record).is_err());
    }
}

//! Sealing: what the users of a tenant with a KMS key of its own have written is stored as what that key alone
//! opens. Pure; [`crate::aws::data_keys`] has KMS make the data keys, and open them again.
//!
//! Envelope encryption: a data key seals, AES-256 in GCM, and is stored beside what it has sealed, itself
//! encrypted by KMS. Each text is bound to its tenant and its place, so that none opens anywhere else.
//! <https://docs.aws.amazon.com/kms/latest/developerguide/kms-cryptography.html#enveloping>

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rand::{CryptoRng, RngExt};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use zeroize::Zeroizing;

use crate::tenant::TenantId;

/// The format of what is sealed here: its first byte.
const FORMAT: u8 = 1;
/// What a sealed text begins with, under its seal: it is the text itself, or JSON.
const TEXT: u8 = b's';
const JSON: u8 = b'j';
/// The longest name of a key.
const MOST_ARN_BYTES: usize = 200;

/// The name of a KMS key: its ARN, and no alias, since what an alias stands for can be changed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KmsKeyArn(String);

/// A text that is no ARN of a KMS key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is not the ARN of a KMS key, `arn:aws:kms:<region>:<account>:key/<id>`")]
pub struct InvalidKmsKeyArn;

impl KmsKeyArn {
    /// The ARN as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for KmsKeyArn {
    type Err = InvalidKmsKeyArn;

    fn from_str(text: &str) -> Result<Self, InvalidKmsKeyArn> {
        let parts: Vec<&str> = text.split(':').collect();
        let ["arn", partition, "kms", region, account, resource] = parts[..] else {
            return Err(InvalidKmsKeyArn);
        };
        let plain = |text: &str| {
            let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            !text.is_empty() && text.bytes().all(fits)
        };
        let well_formed = text.len() <= MOST_ARN_BYTES
            && (partition == "aws" || partition.starts_with("aws-"))
            && plain(partition)
            && plain(region)
            && account.len() == 12
            && account.bytes().all(|b| b.is_ascii_digit())
            && resource.strip_prefix("key/").is_some_and(plain);
        if well_formed { Ok(Self(text.to_owned())) } else { Err(InvalidKmsKeyArn) }
    }
}

impl TryFrom<String> for KmsKeyArn {
    type Error = InvalidKmsKeyArn;
    fn try_from(text: String) -> Result<Self, InvalidKmsKeyArn> {
        text.parse()
    }
}

impl From<KmsKeyArn> for String {
    fn from(arn: KmsKeyArn) -> Self {
        arn.0
    }
}

impl fmt::Display for KmsKeyArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A data key as it is stored: encrypted by KMS.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WrappedKey {
    /// The key that opens it, whatever key the tenant has by now.
    pub arn: KmsKeyArn,
    /// What KMS made of it.
    pub bytes: Vec<u8>,
}

/// A data key that seals and opens. `Debug` hides it.
pub struct DataKey {
    key: LessSafeKey,
    wrapped: WrappedKey,
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataKey").field("arn", &self.wrapped.arn).finish_non_exhaustive()
    }
}

/// Where a sealed text stands: it opens nowhere else.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The tenant.
    pub tenant: &'a TenantId,
    /// The item's sort key.
    pub sort: &'a str,
    /// The item's attribute.
    pub attribute: &'a str,
}

impl Place<'_> {
    /// The place as bytes: each part led by its length, so that no two places are the same.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![FORMAT];
        for part in [self.tenant.as_str(), self.sort, self.attribute] {
            bytes.extend((part.len() as u64).to_be_bytes());
            bytes.extend(part.as_bytes());
        }
        bytes
    }
}

/// Why nothing was sealed or opened. Never holds what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The data key is not 256 bits long.
    #[error("a data key has another length than 256 bits")]
    Key,
    /// It could not be sealed.
    #[error("it could not be sealed")]
    Seal,
    /// It was changed, stands where it was not sealed, or was sealed with another key.
    #[error("what is sealed does not open here with its data key")]
    Open,
}

impl DataKey {
    /// The key whose bytes are `plain`, which KMS has wrapped. The bytes are wiped.
    ///
    /// # Errors
    /// [`SealError::Key`].
    pub fn new(plain: Zeroizing<Vec<u8>>, wrapped: WrappedKey) -> Result<Self, SealError> {
        let key = UnboundKey::new(&AES_256_GCM, &plain).map_err(|_| SealError::Key)?;
        Ok(Self { key: LessSafeKey::new(key), wrapped })
    }

    /// The key as it is stored beside what it has sealed.
    pub const fn wrapped(&self) -> &WrappedKey {
        &self.wrapped
    }

    /// Seals a value for a place. The nonce is drawn at random, which bears 2^32 values under one key; a data key
    /// lives a day at most.
    ///
    /// # Errors
    /// [`SealError::Seal`].
    pub fn seal(
        &self,
        place: Place<'_>,
        value: &Value,
        rng: &mut impl CryptoRng,
    ) -> Result<Vec<u8>, SealError> {
        // A text as it is: as JSON it might grow beyond what an item holds.
        let plain = match value {
            Value::String(text) => [&[TEXT], text.as_bytes()].concat(),
            other => [&[JSON][..], &serde_json::to_vec(other).map_err(|_| SealError::Seal)?].concat(),
        };
        let (mut plain, nonce) = (Zeroizing::new(plain), rng.random::<[u8; NONCE_LEN]>());
        let bound = Aad::from(place.bytes());
        let tag = self
            .key
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), bound, &mut plain)
            .map_err(|_| SealError::Seal)?;
        Ok([&[FORMAT], &nonce[..], &plain, tag.as_ref()].concat())
    }

    /// Opens what was sealed for this very place with this key.
    ///
    /// # Errors
    /// [`SealError::Open`].
    pub fn open(&self, place: Place<'_>, sealed: &[u8]) -> Result<Value, SealError> {
        let rest = sealed.strip_prefix(&[FORMAT]).ok_or(SealError::Open)?;
        let (nonce, rest) = rest.split_first_chunk::<NONCE_LEN>().ok_or(SealError::Open)?;
        let mut rest = Zeroizing::new(rest.to_vec());
        let (nonce, bound) = (Nonce::assume_unique_for_key(*nonce), Aad::from(place.bytes()));
        let plain = self.key.open_in_place(nonce, bound, &mut rest).map_err(|_| SealError::Open)?;
        match plain.split_first() {
            Some((&TEXT, text)) => {
                let text = std::str::from_utf8(text).map_err(|_| SealError::Open)?;
                Ok(Value::String(text.to_owned()))
            }
            Some((&JSON, json)) => serde_json::from_slice(json).map_err(|_| SealError::Open),
            _ => Err(SealError::Open),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::random::entropy;

    const ARN: &str = "arn:aws:kms:us-east-1:000000000000:key/1b2c3d4e-0000-4000-8000-000000000000";

    fn data_key(byte: u8) -> DataKey {
        let wrapped = WrappedKey { arn: ARN.parse().unwrap(), bytes: vec![byte] };
        DataKey::new(Zeroizing::new(vec![byte; 32]), wrapped).unwrap()
    }

    fn tenant(id: &str) -> TenantId {
        id.parse().unwrap()
    }

    fn place<'a>(tenant: &'a TenantId, sort: &'a str, attribute: &'a str) -> Place<'a> {
        Place { tenant, sort, attribute }
    }

    #[test]
    fn names_of_keys() {
        for good in [ARN, "arn:aws-cn:kms:cn-north-1:123456789012:key/mrk-0123456789abcdef0123456789abcdef"] {
            assert_eq!(good.parse::<KmsKeyArn>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            "1b2c3d4e-0000-4000-8000-000000000000",
            "alias/acme",
            "arn:aws:kms:us-east-1:000000000000:alias/acme",
            "arn:aws:kms:us-east-1:000000000000:key/",
            "arn:aws:kms:us-east-1:00000000000:key/a",
            "arn:aws:kms::000000000000:key/a",
            "arn:aws:s3:us-east-1:000000000000:key/a",
            "arn:aw:kms:us-east-1:000000000000:key/a",
            "arn:aws:kms:us-east-1:000000000000:key/a:b",
            "arn:aws:kms:us-east-1:000000000000:key/a b",
            "arn:aws:kms:us-east-1:000000000000:key/*",
            "arn:aws:kms:us-east-1:000000000000:key/A",
            &format!("arn:aws:kms:us-east-1:000000000000:key/{}", "a".repeat(200)),
        ] {
            assert_eq!(bad.parse::<KmsKeyArn>(), Err(InvalidKmsKeyArn), "{bad}");
        }
    }

    #[test]
    fn a_text_opens_where_it_was_sealed_and_nowhere_else() {
        let (acme, other) = (tenant("acme"), tenant("acme-1"));
        let (key, value) = (data_key(1), json!("five words that are secret"));
        let sealed = key.seal(place(&acme, "CONV#a#1", "question"), &value, &mut entropy()).unwrap();
        assert_eq!(key.open(place(&acme, "CONV#a#1", "question"), &sealed), Ok(value));
        for elsewhere in [
            place(&other, "CONV#a#1", "question"),
            place(&acme, "CONV#a#2", "question"),
            place(&acme, "CONV#a#1", "answer"),
            place(&acme, "CONV#a#", "1question"),
            place(&acme, "", ""),
        ] {
            assert_eq!(key.open(elsewhere, &sealed), Err(SealError::Open), "{elsewhere:?}");
        }
        let wrong = data_key(2).open(place(&acme, "CONV#a#1", "question"), &sealed);
        assert_eq!(wrong, Err(SealError::Open));
    }

    #[test]
    fn the_same_again_looks_different_and_a_text_grows_by_thirty_bytes() {
        let acme = tenant("acme");
        let (key, at) = (data_key(1), place(&acme, "DOC#a", "title"));
        let text = "\u{1}\"\n".repeat(1_000);
        let seal = || key.seal(at, &json!(text), &mut entropy()).unwrap();
        assert_ne!(seal(), seal());
        assert_eq!(seal().len(), text.len() + 30);
    }

    #[test]
    fn a_key_is_256_bits_long_and_shown_nowhere() {
        let wrapped = data_key(7).wrapped().clone();
        for length in [0, 16, 31, 33] {
            let refused = DataKey::new(Zeroizing::new(vec![7; length]), wrapped.clone());
            assert_eq!(refused.unwrap_err(), SealError::Key);
        }
        assert_eq!(format!("{:?}", data_key(7)), format!("DataKey {{ arn: KmsKeyArn({ARN:?}), .. }}"));
    }

    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            any::<String>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<bool>().prop_map(Value::from),
            Just(Value::Null),
            proptest::collection::vec(any::<String>(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(any::<String>(), any::<u32>(), 0..4)
                .prop_map(|fields| json!(fields)),
        ]
    }

    proptest! {
        #[test]
        fn whatever_is_sealed_is_opened(value in value(), sort in ".{0,40}", attribute in "[a-z_]{0,12}") {
            let (acme, key) = (tenant("acme"), data_key(3));
            let at = place(&acme, &sort, &attribute);
            let sealed = key.seal(at, &value, &mut entropy()).unwrap();
            prop_assert_eq!(key.open(at, &sealed), Ok(value));
        }

        #[test]
        fn whatever_is_changed_does_not_open(value in value(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let (acme, key) = (tenant("acme"), data_key(3));
            let here = place(&acme, "CONV#a#1", "answer");
            let sealed = key.seal(here, &value, &mut entropy()).unwrap();
            let at = at.index(sealed.len());
            let mut flipped = sealed.clone();
            flipped[at] ^= 1 << bit;
            prop_assert_eq!(key.open(here, &flipped), Err(SealError::Open));
            prop_assert_eq!(key.open(here, &sealed[..at]), Err(SealError::Open));
            let longer = [&sealed[..], &[0]].concat();
            prop_assert_eq!(key.open(here, &longer), Err(SealError::Open));
        }
    }
}

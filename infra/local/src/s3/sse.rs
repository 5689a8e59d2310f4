//! Server-side encryption with keys of KMS. S3 asks KMS in the name of whoever puts or reads an object, for a data key
//! that is bound to the object's ARN and to what its sender has said besides: so the policies of both count, and an
//! object whose key is off cannot be read.
//! <https://docs.aws.amazon.com/AmazonS3/latest/userguide/UsingKMSEncryption.html>
//!
//! Objects under AWS's own keys, as a bucket's default has it, lie as they are. One that is encrypted is sealed and
//! opened in memory as a whole.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use s3s::dto::PutObjectInput;
use s3s::{S3Error, S3ErrorCode, S3Result, s3_error};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::aws_json::Refusal;
use crate::iam::Caller;
use crate::kms::Kms;

/// What encrypts an object, as it is kept with it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Encryption {
    /// The key's ARN.
    pub(super) key: String,
    /// What the data key is bound to.
    context: BTreeMap<String, String>,
    /// The data key as KMS has wrapped it.
    wrapped: Value,
}

/// What the sender of an object asks for.
#[derive(Debug)]
pub(super) struct Asked {
    key: String,
    context: BTreeMap<String, String>,
}

/// A data key that is good for one object.
pub(super) struct DataKey(LessSafeKey);

impl Asked {
    /// From the headers of a write; none if the bucket's default is to hold.
    pub(super) fn of(input: &PutObjectInput) -> S3Result<Option<Self>> {
        let Some(kind) = &input.server_side_encryption else {
            return match (&input.ssekms_key_id, &input.ssekms_encryption_context) {
                (None, None) => Ok(None),
                _ => Err(s3_error!(
                    InvalidArgument,
                    "Server Side Encryption with AWS KMS managed key requires HTTP header x-amz-server-side-encryption : aws:kms"
                )),
            };
        };
        match (kind.as_str(), &input.ssekms_key_id, input.bucket_key_enabled) {
            ("aws:kms", Some(key), None | Some(false)) => {
                let context = input.ssekms_encryption_context.as_deref().map(parse_context).transpose()?;
                Ok(Some(Self { key: key.clone(), context: context.unwrap_or_default() }))
            }
            (kind, _, _) => Err(s3_error!(
                NotImplemented,
                "x-amz-server-side-encryption {kind} is implemented as aws:kms alone, with a key that is named and no bucket key"
            )),
        }
    }
}

fn parse_context(text: &str) -> S3Result<BTreeMap<String, String>> {
    let json = STANDARD.decode(text).ok();
    json.and_then(|json| serde_json::from_slice(&json).ok()).ok_or_else(|| {
        s3_error!(
            InvalidArgument,
            "The header 'x-amz-server-side-encryption-context' shall be Base64-encoded UTF-8 string holding JSON which represents a string-string map"
        )
    })
}

/// Has KMS make a data key for an object.
pub(super) fn generate(
    kms: &Kms,
    caller: &Caller,
    asked: Asked,
    (bucket, key): (&str, &str),
) -> S3Result<(DataKey, Encryption)> {
    let Asked { key: named, mut context } = asked;
    context.insert("aws:s3:arn".to_owned(), format!("arn:aws:s3:::{bucket}/{key}"));
    let input = json!({"KeyId": named, "KeySpec": "AES_256", "EncryptionContext": context});
    let made = kms.ask(caller, "GenerateDataKey", input.to_string().as_bytes()).map_err(refused)?;
    let field = |name: &str| made.get(name).cloned().unwrap_or_default();
    let key = field("KeyId").as_str().unwrap_or_default().to_owned();
    Ok((data_key(&made)?, Encryption { key, context, wrapped: field("CiphertextBlob") }))
}

/// Has KMS open the data key of an object.
pub(super) fn decrypt(kms: &Kms, caller: &Caller, with: &Encryption) -> S3Result<DataKey> {
    let input = json!({"CiphertextBlob": with.wrapped, "EncryptionContext": with.context});
    data_key(&kms.ask(caller, "Decrypt", input.to_string().as_bytes()).map_err(refused)?)
}

fn data_key(answer: &Value) -> S3Result<DataKey> {
    let plain = answer.get("Plaintext").and_then(Value::as_str);
    let plain = plain.and_then(|plain| STANDARD.decode(plain).ok());
    let key = plain.and_then(|plain| UnboundKey::new(&AES_256_GCM, &plain).ok());
    key.map(|key| DataKey(LessSafeKey::new(key))).ok_or_else(|| broken("KMS has made no data key"))
}

impl DataKey {
    /// Seals a file where it lies.
    pub(super) fn seal(&self, path: &Path) -> S3Result<()> {
        let mut bytes = std::fs::read(path).map_err(S3Error::internal_error)?;
        let sealed = self.0.seal_in_place_append_tag(nonce(), Aad::empty(), &mut bytes);
        sealed.map_err(|_| broken("an object could not be sealed"))?;
        std::fs::write(path, bytes).map_err(S3Error::internal_error)
    }

    /// What was sealed in a file.
    pub(super) fn open(&self, path: &Path) -> S3Result<Vec<u8>> {
        let mut bytes = std::fs::read(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => s3_error!(NoSuchKey, "The specified key does not exist."),
            _ => S3Error::internal_error(error),
        })?;
        let opened = self.0.open_in_place(nonce(), Aad::empty(), &mut bytes);
        let length = opened.map_err(|_| broken("an object does not open with its data key"))?.len();
        bytes.truncate(length);
        Ok(bytes)
    }
}

/// A data key seals one object, once.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

fn broken(what: &'static str) -> S3Error {
    S3Error::internal_error(io::Error::other(what))
}

/// What S3 makes of KMS's refusals. It hands on what is wrong with a key.
/// <https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html#ErrorCodeList>
fn refused(Refusal { kind, message }: Refusal) -> S3Error {
    match kind {
        "AccessDeniedException" => s3_error!(AccessDenied, "{message}"),
        "KMSInternalException" => s3_error!(ServiceUnavailable, "{message}"),
        _ => {
            let code = S3ErrorCode::Custom(format!("KMS.{kind}").into());
            let mut error = S3Error::with_message(code, message);
            error.set_status_code(StatusCode::BAD_REQUEST);
            error
        }
    }
}

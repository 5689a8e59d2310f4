//! To call a key verified that nobody compared, or an operator whom IAM did not name.
use shared::api_key::{KeyRecord, VerifiedKey};
use shared::scope::{Operator, RequestId};

fn verified(record: KeyRecord) -> VerifiedKey {
    //~ E0451: field `record` of struct `VerifiedKey` is private
    VerifiedKey { record }
}

fn operator(arn: String, request_id: RequestId) -> Operator {
    //~ E0451: fields `arn`, `request_id` and `trace` of struct `Operator` are private
    Operator { arn, request_id, trace: None }
}

fn main() {}

//! To call a key verified that nobody compared, or an operator whom IAM did not name.
use shared::api_key::{KeyRecord, VerifiedKey};
use shared::scope::{Operator, RequestId};

fn verified(record: KeyRecord) -> VerifiedKey {
    VerifiedKey { record }
}

fn operator(arn: String, request_id: RequestId) -> Operator {
    Operator { arn, request_id, trace: None }
}

fn main() {}

//! `issuers`

use std::io::{BufRead, Write};

use super::Console;
use crate::api::{Api, CallError};
use crate::command::{IssuersCommand, Names};

const CLAIM: [&str; 2] = ["admin", "issuer-claim"];

pub(super) async fn run<I: BufRead, O: Write, E: Write>(
    api: &Api,
    command: IssuersCommand,
    console: &mut Console<I, O, E>,
) -> Result<(), CallError> {
    match command {
        IssuersCommand::Show(names) => console.object(&api.get(&CLAIM, &query(&names)).await?),
        IssuersCommand::Release { tenant, names } => {
            let mut query = query(&names);
            query.push(("tenant_id", tenant.to_string()));
            console.object(&api.delete(&CLAIM, &query).await?)
        }
    }
}

fn query(names: &Names) -> Vec<(&'static str, String)> {
    vec![("issuer", names.issuer.clone()), ("audience", names.audience.clone())]
}

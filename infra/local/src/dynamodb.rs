//! DynamoDB and its streams, on SQLite: the tables of the template, made where they are not yet, and a
//! front before them, which watches calls and lets tests disturb them.

mod call;
mod faults;
mod front;
mod journal;

use std::collections::BTreeMap;
use std::future::Future;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;

use dynoxide::Database;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

pub use self::faults::BadRules;
pub use self::front::{Front, Kill};
pub use self::journal::Entry;
use crate::template::{Index, KeyAttribute, Table};

/// Why the tables cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("the tables cannot be served: {0}")]
pub struct Error(String);

/// Opens the database and makes the tables that it lacks.
///
/// # Errors
/// If the file cannot be used or a table is refused.
pub fn open(path: &Path, tables: &[Table]) -> Result<Database, Error> {
    let path = path.to_str().ok_or_else(|| Error("the path of the data directory is not UTF-8".into()))?;
    let database = Database::new(path).map_err(failed)?;
    index_streams(path).map_err(failed)?;
    for table in tables {
        let describe = request(json!({ "TableName": table.name }))?;
        if database.describe_table(describe).is_ok() {
            continue;
        }
        database.create_table(request(create_table(table))?).map_err(failed)?;
        if let Some(attribute) = &table.ttl_attribute {
            let ttl = json!({
                "TableName": table.name,
                "TimeToLiveSpecification": { "AttributeName": attribute, "Enabled": true }
            });
            database.update_time_to_live(request(ttl)?).map_err(failed)?;
        }
    }
    Ok(database)
}

/// Without an index each write looks through all that the streams hold for its number, and gets slower
/// with each: by 50,000 records, a hundred times.
fn index_streams(path: &str) -> rusqlite::Result<()> {
    let file = rusqlite::Connection::open(path)?;
    file.busy_timeout(std::time::Duration::from_secs(5))?;
    file.execute_batch(
        "CREATE INDEX IF NOT EXISTS stream_numbers ON _stream_records
             (table_name, CAST(sequence_number AS INTEGER));
         CREATE INDEX IF NOT EXISTS shard_numbers ON _stream_records
             (table_name, shard_id, CAST(sequence_number AS INTEGER));",
    )
}

/// Serves the database behind `front` until `shutdown` resolves.
///
/// # Errors
/// If a listener fails.
pub async fn serve(
    listener: TcpListener,
    database: Database,
    front: Arc<Front>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    // The server cannot be called in process: it takes nothing but a listener.
    let inner = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(failed)?;
    let behind = inner.local_addr().map_err(failed)?.port();
    // Ends behind the front, so that what the front has taken in can still be done.
    let (stop, stopped) = oneshot::channel::<()>();
    let tables = dynoxide::server::serve_with_shutdown(inner, database, async {
        // An error means that the front has ended, which is what is waited for.
        let _ = stopped.await;
    });
    let watched = async {
        let served = front::serve(listener, front, behind, shutdown).await;
        drop(stop);
        served.map_err(failed)
    };
    let tables = async { tables.await.map_err(Error) };
    tokio::try_join!(watched, tables).map(|_| ())
}

fn create_table(table: &Table) -> Value {
    let mut attributes = BTreeMap::new();
    let mut schema = |hash: &KeyAttribute, range: Option<&KeyAttribute>| {
        let keys = [(Some(hash), "HASH"), (range, "RANGE")];
        let keys = keys.into_iter().filter_map(|(key, kind)| Some((key?, kind)));
        let schema: Vec<Value> = keys
            .map(|(key, kind)| {
                attributes.insert(key.name.clone(), key.kind.clone());
                json!({ "AttributeName": key.name, "KeyType": kind })
            })
            .collect();
        schema
    };
    let keys = schema(&table.hash_key, table.range_key.as_ref());
    let index = |index: &Index| {
        json!({
            "IndexName": index.name,
            "KeySchema": schema(&index.hash_key, index.range_key.as_ref()),
            "Projection": { "ProjectionType": "ALL" },
        })
    };
    let indexes: Vec<Value> = table.indexes.iter().map(index).collect();
    let attributes =
        attributes.iter().map(|(name, kind)| json!({ "AttributeName": name, "AttributeType": kind }));
    let mut create = json!({
        "TableName": table.name,
        "BillingMode": "PAY_PER_REQUEST",
        "KeySchema": keys,
        "AttributeDefinitions": attributes.collect::<Vec<_>>(),
    });
    if let (false, Some(fields)) = (indexes.is_empty(), create.as_object_mut()) {
        fields.insert("GlobalSecondaryIndexes".to_owned(), indexes.into());
    }
    if let (Some(view), Some(fields)) = (&table.stream_view, create.as_object_mut()) {
        let stream = json!({ "StreamEnabled": true, "StreamViewType": view });
        fields.insert("StreamSpecification".to_owned(), stream);
    }
    create
}

fn request<T: DeserializeOwned>(value: Value) -> Result<T, Error> {
    serde_json::from_value(value).map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error(error.to_string())
}

#[cfg(test)]
mod tests;

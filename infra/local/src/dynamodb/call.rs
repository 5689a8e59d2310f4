//! What a call is about: read off the wire, nothing of it decided here.

use std::collections::BTreeMap;

use bytes::{BufMut, Bytes, BytesMut};
use http::HeaderMap;
use serde_json::{Map, Value};

use crate::iam::Intent;
use crate::template::{ACCOUNT, REGION};

/// The operations on items; of these DynamoDB says, on request, what they consumed.
pub(super) const ITEM_OPERATIONS: [&str; 10] = [
    "BatchGetItem",
    "BatchWriteItem",
    "DeleteItem",
    "GetItem",
    "PutItem",
    "Query",
    "Scan",
    "TransactGetItems",
    "TransactWriteItems",
    "UpdateItem",
];
/// Those that write, and so may appear in a stream.
const WRITES: [&str; 5] = ["BatchWriteItem", "DeleteItem", "PutItem", "TransactWriteItems", "UpdateItem"];
const CAPACITY: &str = "ReturnConsumedCapacity";

/// The partition key's attribute of each table, by the table's name.
pub(super) type PartitionKeys = BTreeMap<String, String>;

/// One call, read.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Call {
    /// The operation, such as `PutItem`; empty if the request names none.
    pub operation: String,
    /// The tables it names, each once.
    pub tables: Vec<String>,
    /// The partition keys it names, each once; not those of a query whose condition is out of the ordinary.
    pub keys: Vec<String>,
    /// How many parts a transaction has; 0 for anything else.
    pub actions: usize,
    /// What is done to which table or index, each with the partition keys that are named: what policies
    /// are asked about.
    pub intents: Vec<Intent>,
    /// The request's body, as it is passed on: it asks for the consumed capacity.
    pub body: Bytes,
}

impl Call {
    /// Reads a request. What is malformed is left to DynamoDB to refuse: it comes out empty here.
    pub(super) fn read(headers: &HeaderMap, body: Bytes, partition_keys: &PartitionKeys) -> Self {
        let target = headers.get("x-amz-target").and_then(|target| target.to_str().ok()).unwrap_or_default();
        let operation = target.split_once('.').map_or("", |(_, operation)| operation);
        let request: Value = serde_json::from_slice(&body).unwrap_or_default();
        let parts = parts(operation, &request);
        let (mut tables, mut keys) = (Vec::new(), Vec::new());
        for part in &parts {
            push_new(&mut tables, part.table.clone());
            if let Some(attribute) = partition_keys.get(&part.table)
                && let Some(key) = part.partition_key(attribute)
            {
                push_new(&mut keys, key);
            }
        }
        let transaction = request.get("TransactItems").and_then(Value::as_array);
        let intents = intents(operation, &request, &parts, partition_keys);
        Self {
            intents,
            operation: operation.to_owned(),
            tables,
            keys,
            actions: transaction.map_or(0, Vec::len),
            body: asking_for_capacity(operation, &request, body),
        }
    }

    /// Whether it may change items.
    pub(super) fn writes(&self) -> bool {
        WRITES.contains(&self.operation.as_str())
    }
}

/// A table's name in its ARN, or an index's.
fn arn(resource: &str) -> String {
    format!("arn:aws:dynamodb:{REGION}:{ACCOUNT}:table/{resource}")
}

/// What a policy has to allow. A transaction is allowed by the actions of its parts; whatever names no
/// table is an action on everything.
fn intents(operation: &str, request: &Value, parts: &[Part<'_>], keys: &PartitionKeys) -> Vec<Intent> {
    let mut intents: Vec<Intent> = Vec::new();
    for part in parts {
        let action = format!("dynamodb:{}", part.action.unwrap_or(operation));
        let index = request.get("IndexName").and_then(Value::as_str);
        let resource =
            index.map_or_else(|| part.table.clone(), |index| format!("{}/index/{index}", part.table));
        let mut intent = Intent::new(action, arn(&resource));
        if let Some(key) = keys.get(&part.table).and_then(|attribute| part.partition_key(attribute)) {
            intent.context.insert("dynamodb:LeadingKeys".to_owned(), vec![key]);
        }
        let attributes = part.attributes();
        if !attributes.is_empty() {
            intent.context.insert("dynamodb:Attributes".to_owned(), attributes);
        }
        if !intents.contains(&intent) {
            intents.push(intent);
        }
    }
    if intents.is_empty() {
        intents.push(Intent::new(format!("dynamodb:{operation}"), "*"));
    }
    intents
}

/// What of a request concerns one table.
struct Part<'a> {
    /// The action that it is by itself, where that is not the operation.
    action: Option<&'static str>,
    table: String,
    /// The item or its key.
    item: Option<&'a Value>,
    /// A query's whole request.
    query: Option<&'a Value>,
    /// Where its expressions stand.
    fields: &'a Value,
}

/// The fields of a call that are expressions.
const EXPRESSIONS: [&str; 5] = [
    "UpdateExpression",
    "ConditionExpression",
    "ProjectionExpression",
    "FilterExpression",
    "KeyConditionExpression",
];
/// Those of calls in the old manner, that name attributes as their own fields.
const LEGACY: [&str; 6] =
    ["AttributeUpdates", "Expected", "KeyConditions", "QueryFilter", "ScanFilter", "AttributesToGet"];
/// Words of an expression that are no attributes.
const WORDS: [&str; 18] = [
    "SET",
    "REMOVE",
    "ADD",
    "DELETE",
    "AND",
    "OR",
    "NOT",
    "BETWEEN",
    "IN",
    "attribute_exists",
    "attribute_not_exists",
    "attribute_type",
    "begins_with",
    "contains",
    "size",
    "if_not_exists",
    "list_append",
    "",
];

impl Part<'_> {
    /// The attributes that the request names, each once and by its top level: those of the item or key,
    /// and of every expression. <https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/specifying-conditions.html>
    fn attributes(&self) -> Vec<String> {
        let mut all = Vec::new();
        map(self.item).for_each(|(name, _)| push_new(&mut all, name.clone()));
        for field in LEGACY {
            let value = self.fields.get(field);
            map(value).for_each(|(name, _)| push_new(&mut all, name.clone()));
            let listed = value.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
            listed.for_each(|name| push_new(&mut all, name.to_owned()));
        }
        let names = self.fields.get("ExpressionAttributeNames");
        for expression in EXPRESSIONS.iter().filter_map(|field| self.fields.get(*field)?.as_str()) {
            let parts = expression.split(|c: char| !(c.is_alphanumeric() || "_#:.-".contains(c)));
            for path in parts {
                let top = path.split('.').next().unwrap_or_default();
                let value = top.starts_with(|c: char| c == ':' || c == '-' || c.is_ascii_digit());
                if value || WORDS.iter().any(|word| word.eq_ignore_ascii_case(top)) {
                    continue;
                }
                let name = names.and_then(|names| names.get(top)).and_then(Value::as_str).unwrap_or(top);
                push_new(&mut all, name.to_owned());
            }
        }
        all
    }

    fn partition_key(&self, attribute: &str) -> Option<String> {
        if let Some(value) = self.item.and_then(|item| item.get(attribute)) {
            return text(value);
        }
        let query = self.query?;
        let condition = query.get("KeyConditionExpression")?.as_str()?;
        let names = query.get("ExpressionAttributeNames");
        condition.split(" AND ").flat_map(|part| part.split(" and ")).find_map(|part| {
            let (left, right) = part.split_once('=')?;
            let bare = |side: &str| side.trim_matches([' ', '(', ')']).to_owned();
            let (left, right) = (bare(left), bare(right));
            let name = names.and_then(|names| names.get(&left)).and_then(Value::as_str).unwrap_or(&left);
            (name == attribute).then_some(())?;
            text(query.get("ExpressionAttributeValues")?.get(right)?)
        })
    }
}

/// A key's value, whatever its type: `{"S": "acme"}` is `acme`.
fn text(value: &Value) -> Option<String> {
    value.as_object()?.values().next()?.as_str().map(str::to_owned)
}

/// The last part of an ARN; tables go by either.
fn table_name(name: &Value) -> Option<String> {
    let name = name.as_str()?;
    Some(name.rsplit('/').next().unwrap_or(name).to_owned())
}

fn parts<'a>(operation: &str, request: &'a Value) -> Vec<Part<'a>> {
    let list = |value: Option<&'a Value>| value.and_then(Value::as_array).into_iter().flatten();
    match operation {
        "BatchGetItem" => map(request.get("RequestItems"))
            .flat_map(|(table, get)| {
                list(get.get("Keys")).map(|key| Part {
                    action: None,
                    table: table.clone(),
                    item: Some(key),
                    query: None,
                    fields: get,
                })
            })
            .collect(),
        "BatchWriteItem" => map(request.get("RequestItems"))
            .flat_map(|(table, writes)| {
                // DynamoDB refuses a write of both kinds; what is asked about here are both.
                list(Some(writes)).flat_map(|write| map(Some(write))).map(|(kind, write)| {
                    let item = write.get(if kind == "PutRequest" { "Item" } else { "Key" });
                    Part { action: None, table: table.clone(), item, query: None, fields: &Value::Null }
                })
            })
            .collect(),
        "TransactGetItems" | "TransactWriteItems" => list(request.get("TransactItems"))
            .flat_map(|action| map(Some(action)))
            .filter_map(|(kind, action)| {
                let table = table_name(action.get("TableName")?)?;
                let kind = part_action(kind);
                let item = named_item(kind, action);
                Some(Part { action: Some(kind), table, item, query: None, fields: action })
            })
            .collect(),
        _ => request
            .get("TableName")
            .and_then(table_name)
            .map(|table| {
                let item = named_item(operation, request);
                let query = (operation == "Query").then_some(request);
                Part { action: None, table, item, query, fields: request }
            })
            .into_iter()
            .collect(),
    }
}

/// The item or key that an action is about. One that stands in the other's field is none: DynamoDB does not
/// read it.
fn named_item<'a>(action: &str, fields: &'a Value) -> Option<&'a Value> {
    fields.get(if action == "PutItem" { "Item" } else { "Key" })
}

/// The action of a part of a transaction. What is not known has a name that no policy allows.
fn part_action(kind: &str) -> &'static str {
    match kind {
        "Get" => "GetItem",
        "Put" => "PutItem",
        "Update" => "UpdateItem",
        "Delete" => "DeleteItem",
        "ConditionCheck" => "ConditionCheckItem",
        _ => "UnknownPart",
    }
}

fn map(value: Option<&Value>) -> impl Iterator<Item = (&String, &Value)> {
    value.and_then(Value::as_object).into_iter().flat_map(Map::iter)
}

fn push_new(list: &mut Vec<String>, value: String) {
    if !list.contains(&value) {
        list.push(value);
    }
}

/// The body with `ReturnConsumedCapacity: TOTAL`, unless it asks for that or more by itself. All else
/// stays byte for byte, so that what DynamoDB makes of an odd request is not ours.
fn asking_for_capacity(operation: &str, request: &Value, body: Bytes) -> Bytes {
    let Some(fields) = request.as_object().filter(|_| ITEM_OPERATIONS.contains(&operation)) else {
        return body;
    };
    match fields.get(CAPACITY) {
        None => {}
        Some(asked) if asked == "NONE" => {
            let mut fields = fields.clone();
            fields.insert(CAPACITY.to_owned(), "TOTAL".into());
            return Value::Object(fields).to_string().into();
        }
        Some(_) => return body,
    }
    let Some(open) = body.iter().position(|byte| *byte == b'{') else { return body };
    let (before, after) = (body.slice(..=open), body.slice(open + 1..));
    let mut asking = BytesMut::with_capacity(body.len() + 40);
    asking.extend_from_slice(&before);
    asking.extend_from_slice(format!("\"{CAPACITY}\":\"TOTAL\"").as_bytes());
    if !fields.is_empty() {
        asking.put_u8(b',');
    }
    asking.extend_from_slice(&after);
    asking.freeze()
}

/// The capacity units that an answer speaks of, by table.
pub(super) fn consumed(answer: &Value) -> BTreeMap<String, f64> {
    let mut units = BTreeMap::new();
    let all = match answer.get("ConsumedCapacity") {
        Some(Value::Array(all)) => all.iter().collect(),
        Some(one) => vec![one],
        None => Vec::new(),
    };
    for one in all {
        if let Some(table) = one.get("TableName").and_then(table_name) {
            *units.entry(table).or_default() +=
                one.get("CapacityUnits").and_then(Value::as_f64).unwrap_or(0.0);
        }
    }
    units
}

/// The code of an error, without the name space before it.
pub(super) fn error_code(answer: &Value) -> Option<String> {
    let kind = answer.get("__type")?.as_str()?;
    Some(kind.rsplit('#').next().unwrap_or(kind).to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(operation: &str, body: &str) -> Call {
        let mut headers = HeaderMap::new();
        headers.insert("x-amz-target", format!("DynamoDB_20120810.{operation}").parse().unwrap());
        let keys = [("notes", "pk"), ("other", "id")].map(|(t, k)| (t.to_owned(), k.to_owned())).into();
        Call::read(&headers, Bytes::from(body.to_owned()), &keys)
    }

    #[test]
    fn tables_and_keys_are_found_wherever_an_operation_names_them() {
        let cases = [
            ("PutItem", json!({"TableName": "notes", "Item": {"pk": {"S": "a"}, "x": {"S": "b"}}})),
            ("GetItem", json!({"TableName": "arn:aws:dynamodb:x:0:table/notes", "Key": {"pk": {"S": "a"}}})),
            (
                "BatchGetItem",
                json!({"RequestItems": {"notes": {"Keys": [{"pk": {"S": "a"}}, {"pk": {"S": "a"}}]}}}),
            ),
            (
                "BatchWriteItem",
                json!({"RequestItems": {"notes": [{"DeleteRequest": {"Key": {"pk": {"S": "a"}}}}]}}),
            ),
            (
                "TransactWriteItems",
                json!({"TransactItems": [{"Update": {"TableName": "notes", "Key": {"pk": {"S": "a"}}}}]}),
            ),
            (
                "TransactGetItems",
                json!({"TransactItems": [{"Get": {"TableName": "notes", "Key": {"pk": {"S": "a"}}}}]}),
            ),
            (
                "Query",
                json!({
                    "TableName": "notes",
                    "KeyConditionExpression": "(#k = :p) and begins_with(sk, :s)",
                    "ExpressionAttributeNames": {"#k": "pk"},
                    "ExpressionAttributeValues": {":p": {"S": "a"}, ":s": {"S": "x"}},
                }),
            ),
        ];
        for (operation, body) in cases {
            let call = read(operation, &body.to_string());
            assert_eq!(
                (&*call.tables, &*call.keys),
                (&["notes".to_owned()][..], &["a".to_owned()][..]),
                "{operation}"
            );
            assert_eq!(call.actions, usize::from(operation.starts_with("Transact")));
        }
        let both = json!({"RequestItems": {
            "notes": [{"PutRequest": {"Item": {"pk": {"S": "a"}}}}],
            "other": [{"PutRequest": {"Item": {"id": {"N": "7"}}}}],
        }});
        let call = read("BatchWriteItem", &both.to_string());
        assert_eq!(
            (call.tables, call.keys),
            (vec!["notes".into(), "other".into()], vec!["a".into(), "7".into()])
        );
    }

    #[test]
    fn what_a_call_does_not_read_names_nothing() {
        let (own, other) = (json!({"pk": {"S": "own"}}), json!({"pk": {"S": "other"}}));
        let both = json!({"TableName": "notes", "Item": own, "Key": other});
        for operation in ["GetItem", "UpdateItem", "DeleteItem"] {
            assert_eq!(read(operation, &both.to_string()).keys, ["other"], "{operation}");
        }
        assert_eq!(read("PutItem", &both.to_string()).keys, ["own"]);
        for (kind, key) in
            [("Put", "own"), ("Update", "other"), ("Delete", "other"), ("ConditionCheck", "other")]
        {
            let call = read("TransactWriteItems", &json!({"TransactItems": [{kind: both}]}).to_string());
            assert_eq!(call.keys, [key], "{kind}");
        }
        let write = json!({"PutRequest": {"Item": own}, "DeleteRequest": {"Key": other}});
        let mut call = read("BatchWriteItem", &json!({"RequestItems": {"notes": [write]}}).to_string());
        call.keys.sort();
        assert_eq!(call.keys, ["other", "own"]);
    }

    #[test]
    fn attributes_are_found_wherever_a_request_names_them() {
        let named = |operation: &str, body: Value| {
            let intents = read(operation, &body.to_string()).intents;
            let mut all: Vec<String> = intents
                .iter()
                .flat_map(|intent| intent.context.get("dynamodb:Attributes").cloned().unwrap_or_default())
                .collect();
            all.sort();
            all.join(" ")
        };
        let key = json!({"pk": {"S": "a"}, "sk": {"S": "b"}});
        let update = json!({"TableName": "notes", "Key": key,
            "UpdateExpression": "SET #l.requests[0] = :v, n = if_not_exists(n, :one) - :two REMOVE old.#deep",
            "ConditionExpression": "attribute_exists(#p) AND NOT (epoch BETWEEN :a AND :b) and size(other)>:c",
            "ExpressionAttributeNames": {"#l": "limits", "#p": "pk", "#deep": "deep"}});
        assert_eq!(named("UpdateItem", update.clone()), "epoch limits n old other pk sk");
        let in_transaction = json!({"TransactItems": [{"Update": update}]});
        assert_eq!(named("TransactWriteItems", in_transaction), "epoch limits n old other pk sk");
        let put =
            json!({"TableName": "notes", "Item": {"pk": {"S": "a"}, "limits": {"M": {"x": {"N": "1"}}}}});
        assert_eq!(named("PutItem", put), "limits pk");
        let get = json!({"RequestItems": {"notes": {"Keys": [key], "ProjectionExpression": "a.b, c"}}});
        assert_eq!(named("BatchGetItem", get), "a c pk sk");
        let old =
            json!({"TableName": "notes", "Key": key, "AttributeUpdates": {"limits": {"Value": {"N": "1"}}}});
        assert_eq!(named("UpdateItem", old), "limits pk sk");
        assert_eq!(named("Scan", json!({"TableName": "notes"})), "");
    }

    #[test]
    fn only_the_wish_for_the_consumed_capacity_is_added() {
        let body = |operation, body| String::from_utf8(read(operation, body).body.to_vec()).unwrap();
        assert_eq!(body("Scan", r#" {"a" : 1.0}"#), r#" {"ReturnConsumedCapacity":"TOTAL","a" : 1.0}"#);
        assert_eq!(body("Scan", "{}"), r#"{"ReturnConsumedCapacity":"TOTAL"}"#);
        assert_eq!(
            body("Scan", r#"{"ReturnConsumedCapacity":"NONE"}"#),
            r#"{"ReturnConsumedCapacity":"TOTAL"}"#
        );
        let indexes = r#"{"ReturnConsumedCapacity":"INDEXES"}"#;
        assert_eq!(body("Scan", indexes), indexes);
        for (operation, text) in [("DescribeTable", "{}"), ("Scan", "[]"), ("Scan", "{"), ("Scan", "")] {
            assert_eq!(body(operation, text), text, "{operation}");
        }
    }

    #[test]
    fn what_an_answer_consumed_is_summed_by_table() {
        let unit = |table: &str, units: f64| json!({"TableName": table, "CapacityUnits": units});
        let all = consumed(&json!({"ConsumedCapacity": [unit("a", 2.0), unit("b", 0.5), unit("a", 1.0)]}));
        assert_eq!(all, [("a".to_owned(), 3.0), ("b".to_owned(), 0.5)].into());
        assert_eq!(consumed(&json!({"ConsumedCapacity": unit("a", 1.0)})), [("a".to_owned(), 1.0)].into());
        assert!(consumed(&json!({})).is_empty());
    }
}

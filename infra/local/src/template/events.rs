//! What invokes a function by itself: the changes of a table, the messages of a queue, and the clock.

use std::time::Duration;

use serde_json::{Value, json};

use super::{ACCOUNT, Queue, REGION, Resource, Table, TemplateError, invalid, is_true, scalar};
use crate::event_pattern::Pattern;

/// The label in the ARN of every stream: AWS puts the time there at which the stream was made.
const STREAM_LABEL: &str = "2026-01-01T00:00:00.000";
/// What Lambda takes where the template says nothing.
const DEFAULT_BATCH: usize = 100;
const DEFAULT_QUEUE_BATCH: usize = 10;
/// Invocations at once for one queue, where the template sets no bound: here nobody has more to do.
const DEFAULT_CONCURRENCY: usize = 10;
const DEFAULT_RETRIES: u32 = 2;

/// The ARN of a table's stream.
pub(super) fn stream_arn(table: &str) -> String {
    format!("arn:aws:dynamodb:{REGION}:{ACCOUNT}:table/{table}/stream/{STREAM_LABEL}")
}

/// The ARN of a queue.
pub fn queue_arn(queue: &str) -> String {
    format!("arn:aws:sqs:{REGION}:{ACCOUNT}:{queue}")
}

/// What invokes a function besides requests.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Events {
    /// Streams of tables.
    pub streams: Vec<StreamEvent>,
    /// Queues.
    pub queues: Vec<QueueEvent>,
    /// Schedules.
    pub schedules: Vec<ScheduleEvent>,
}

/// The changes of a table, in batches.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamEvent {
    /// The mapping's name in the template.
    pub name: String,
    /// The table's name in the account.
    pub table: String,
    /// The stream's ARN.
    pub stream_arn: String,
    /// Where to begin when it is first set up.
    pub starting_position: StartingPosition,
    /// The most records in one invocation.
    pub batch_size: usize,
    /// How long to wait for a batch to fill.
    pub window: Duration,
    /// How often a failed batch is tried again; without end if not said.
    pub max_retries: Option<u32>,
    /// How old a record may be to be still tried.
    pub max_age: Option<Duration>,
    /// Whether a failed batch is halved.
    pub bisect: bool,
    /// Whether the function says which records failed.
    pub reports_item_failures: bool,
    /// The name of the queue that is told of records that are given up.
    pub on_failure: Option<String>,
    /// Records that match none of these are passed over; all are wanted if there is none.
    pub filters: Vec<Pattern>,
}

/// The messages of a queue, in batches.
#[derive(Clone, Debug, PartialEq)]
pub struct QueueEvent {
    /// The mapping's name in the template.
    pub name: String,
    /// The queue.
    pub queue: Queue,
    /// The most messages in one invocation.
    pub batch_size: usize,
    /// The most invocations at once.
    pub concurrency: usize,
    /// Whether the function says which messages failed.
    pub reports_item_failures: bool,
}

/// Where a stream is begun to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartingPosition {
    /// At the oldest record.
    TrimHorizon,
    /// Behind the newest.
    Latest,
}

/// An invocation at a steady rate.
#[derive(Clone, Debug, PartialEq)]
pub struct ScheduleEvent {
    /// Its name in the template, within the function.
    pub name: String,
    /// How long between two invocations.
    pub every: Duration,
    /// The event. If there is none, one is made that says when it was due.
    pub input: Option<Value>,
    /// How the made event says where it comes from: its source and its ARN.
    pub source: (&'static str, String),
    /// How often a failed invocation is tried again.
    pub max_retries: u32,
}

/// The events of a function.
///
/// SAM's own events of types `DynamoDB` and `SQS` are not known here: they let the function read every stream, or every
/// queue, of the account. Mappings do for both.
pub(super) fn events(resource: &Resource) -> Result<Events, TemplateError> {
    let mut events = Events::default();
    let declared = match resource.get("/Events") {
        None => return Ok(events),
        Some(Value::Object(declared)) => declared,
        Some(_) => return Err(invalid(resource.at("/Events"), "is not a map")),
    };
    for name in declared.keys() {
        let event = Event { resource, name, pointer: format!("/Events/{name}/Properties") };
        match resource.text(&format!("/Events/{name}/Type"))?.as_str() {
            "ScheduleV2" => events.schedules.extend(event.schedule(&V2)?),
            "Schedule" => events.schedules.extend(event.schedule(&V1)?),
            other => {
                let problem = format!("events of type `{other}` are not known to the local stack");
                return Err(invalid(resource.at(&format!("/Events/{name}/Type")), problem));
            }
        }
    }
    Ok(events)
}

/// What the two kinds of schedules say differently.
struct Dialect {
    expression: &'static str,
    properties: &'static [&'static str],
    source: &'static str,
    arn: &'static str,
}

const V1: Dialect = Dialect {
    expression: "Schedule",
    properties: &["Description", "Enabled", "Input", "Name", "RetryPolicy", "Schedule", "State"],
    source: "aws.events",
    arn: "events",
};
const V2: Dialect = Dialect {
    expression: "ScheduleExpression",
    properties: &[
        "Description",
        "FlexibleTimeWindow",
        "Input",
        "Name",
        "RetryPolicy",
        "ScheduleExpression",
        "ScheduleExpressionTimezone",
        "State",
    ],
    source: "aws.scheduler",
    arn: "scheduler",
};

/// One event of a function, or a mapping.
struct Event<'a> {
    resource: &'a Resource,
    name: &'a str,
    pointer: String,
}

impl Event<'_> {
    fn path(&self, property: &str) -> String {
        format!("{}/{property}", self.pointer)
    }

    fn at(&self, property: &str) -> String {
        self.resource.at(&self.path(property))
    }

    fn get(&self, property: &str) -> Option<&Value> {
        self.resource.get(&self.path(property))
    }

    fn text(&self, property: &str) -> Result<String, TemplateError> {
        self.resource.text(&self.path(property))
    }

    fn number<T: std::str::FromStr>(&self, property: &str) -> Result<Option<T>, TemplateError> {
        self.resource.number(&self.path(property))
    }

    /// A limit whose -1 means that there is none, which it also is if nothing is said.
    fn limit(&self, property: &str) -> Result<Option<u32>, TemplateError> {
        match self.number::<i64>(property)? {
            None | Some(-1) => Ok(None),
            Some(limit) => u32::try_from(limit)
                .map(Some)
                .map_err(|_| invalid(self.at(property), format!("`{limit}` is out of range"))),
        }
    }

    fn only(&self, known: &[&str]) -> Result<(), TemplateError> {
        let properties = self.resource.get(&self.pointer).and_then(Value::as_object);
        match properties.into_iter().flatten().find(|(name, _)| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some((name, _)) => Err(invalid(self.at(name), "is not known to the local stack")),
        }
    }

    fn off(&self) -> bool {
        let says = |property: &str, word: &str| {
            self.get(property).and_then(scalar).is_some_and(|value| value.eq_ignore_ascii_case(word))
        };
        says("Enabled", "false") || says("State", "DISABLED")
    }

    fn stream(&self, tables: &[Table], queues: &[Queue]) -> Result<Option<StreamEvent>, TemplateError> {
        const FAILURE: &str = "DestinationConfig/OnFailure";
        self.only(&[
            "BatchSize",
            "BisectBatchOnFunctionError",
            "DestinationConfig",
            "Enabled",
            "EventSourceArn",
            "FilterCriteria",
            "FunctionName",
            "FunctionResponseTypes",
            "MaximumBatchingWindowInSeconds",
            "MaximumRecordAgeInSeconds",
            "MaximumRetryAttempts",
            "ParallelizationFactor",
            "StartingPosition",
        ])?;
        let stream_arn = self.text("EventSourceArn")?;
        let table = tables
            .iter()
            .find(|table| table.stream_view.is_some() && self::stream_arn(&table.name) == stream_arn)
            .ok_or_else(|| {
                let problem = format!("`{stream_arn}` is no stream of a table of the template");
                invalid(self.at("EventSourceArn"), problem)
            })?;
        let starting_position = match self.text("StartingPosition")?.as_str() {
            "TRIM_HORIZON" => StartingPosition::TrimHorizon,
            "LATEST" => StartingPosition::Latest,
            other => {
                let problem = format!("`{other}` is neither TRIM_HORIZON nor LATEST");
                return Err(invalid(self.at("StartingPosition"), problem));
            }
        };
        let batch_size = self.number("BatchSize")?.unwrap_or(DEFAULT_BATCH);
        if !(1..=10_000).contains(&batch_size) {
            return Err(invalid(self.at("BatchSize"), format!("`{batch_size}` is not between 1 and 10000")));
        }
        if self.number::<u32>("ParallelizationFactor")?.is_some_and(|factor| factor != 1) {
            return Err(invalid(self.at("ParallelizationFactor"), "is known to the local stack as 1 alone"));
        }
        let reports_item_failures = self.reports_item_failures()?;
        let on_failure = match self.get(FAILURE) {
            None => None,
            Some(_) => {
                let at = format!("{FAILURE}/Destination");
                let arn = self.text(&at)?;
                let queue = queues.iter().find(|queue| queue_arn(&queue.name) == arn);
                let queue = queue
                    .ok_or_else(|| invalid(self.at(&at), format!("`{arn}` is no queue of the template")))?;
                Some(queue.name.clone())
            }
        };
        let event = StreamEvent {
            name: self.name.to_owned(),
            table: table.name.clone(),
            stream_arn,
            starting_position,
            batch_size,
            window: Duration::from_secs(self.number("MaximumBatchingWindowInSeconds")?.unwrap_or(0)),
            max_retries: self.limit("MaximumRetryAttempts")?,
            max_age: self
                .limit("MaximumRecordAgeInSeconds")?
                .map(|seconds| Duration::from_secs(seconds.into())),
            bisect: is_true(self.get("BisectBatchOnFunctionError")),
            reports_item_failures,
            on_failure,
            filters: self.filters()?,
        };
        Ok((!self.off()).then_some(event))
    }

    fn reports_item_failures(&self) -> Result<bool, TemplateError> {
        match self.get("FunctionResponseTypes") {
            None => Ok(false),
            Some(types) if *types == json!(["ReportBatchItemFailures"]) => Ok(true),
            Some(_) => {
                let problem = "is known to the local stack as [ReportBatchItemFailures] alone";
                Err(invalid(self.at("FunctionResponseTypes"), problem))
            }
        }
    }

    fn filters(&self) -> Result<Vec<Pattern>, TemplateError> {
        const FILTERS: &str = "FilterCriteria/Filters";
        let filters = match self.get(FILTERS) {
            None if self.get("FilterCriteria").is_some() => {
                return Err(invalid(self.at(FILTERS), "is missing"));
            }
            None => return Ok(Vec::new()),
            Some(Value::Array(filters)) => filters,
            Some(_) => return Err(invalid(self.at(FILTERS), "is not a list")),
        };
        (0..filters.len())
            .map(|index| {
                let property = format!("{FILTERS}/{index}/Pattern");
                let text = self.text(&property)?;
                let refused = |problem: String| invalid(self.at(&property), problem);
                let pattern: Value =
                    serde_json::from_str(&text).map_err(|error| refused(format!("is not JSON: {error}")))?;
                Pattern::parse(&pattern).map_err(refused)
            })
            .collect()
    }

    fn schedule(&self, dialect: &Dialect) -> Result<Option<ScheduleEvent>, TemplateError> {
        self.only(dialect.properties)?;
        let expression = self.text(dialect.expression)?;
        let every = rate(&expression).ok_or_else(|| {
            let problem =
                format!("`{expression}`: only rate(n minutes|hours|days) is known to the local stack");
            invalid(self.at(dialect.expression), problem)
        })?;
        let input = match self.get("Input") {
            None => None,
            Some(Value::String(text)) => Some(
                serde_json::from_str(text)
                    .map_err(|error| invalid(self.at("Input"), format!("is not JSON: {error}")))?,
            ),
            Some(_) => return Err(invalid(self.at("Input"), "is not text")),
        };
        let (function, name) = (&self.resource.id, self.name);
        let kind = match dialect.arn {
            "scheduler" => "schedule/default",
            _ => "rule",
        };
        let arn = format!("arn:aws:{}:{REGION}:{ACCOUNT}:{kind}/{function}{name}", dialect.arn);
        let event = ScheduleEvent {
            name: name.to_owned(),
            every,
            input,
            source: (dialect.source, arn),
            max_retries: self.number("RetryPolicy/MaximumRetryAttempts")?.unwrap_or(DEFAULT_RETRIES),
        };
        Ok((!self.off()).then_some(event))
    }
}

/// Whether a mapping is of a stream; otherwise it is of a queue.
pub(super) fn is_of_stream(mapping: &Resource) -> Result<bool, TemplateError> {
    Ok(mapping.text("/EventSourceArn")?.starts_with("arn:aws:dynamodb:"))
}

/// A mapping of a table's stream to a function, if it is on: the function's name, and what it is invoked with.
pub(super) fn stream_mapping(
    mapping: &Resource,
    tables: &[Table],
    queues: &[Queue],
) -> Result<Option<(String, StreamEvent)>, TemplateError> {
    let event = Event { resource: mapping, name: &mapping.id, pointer: String::new() };
    let function = event.text("FunctionName")?;
    Ok(event.stream(tables, queues)?.map(|read| (function, read)))
}

/// A mapping of a queue to a function, if it is on: the function's name, and what it is invoked with.
pub(super) fn queue_mapping(
    mapping: &Resource,
    queues: &[Queue],
) -> Result<Option<(String, QueueEvent)>, TemplateError> {
    let event = Event { resource: mapping, name: &mapping.id, pointer: String::new() };
    event.only(&[
        "BatchSize",
        "Enabled",
        "EventSourceArn",
        "FunctionName",
        "FunctionResponseTypes",
        "ScalingConfig",
    ])?;
    let arn = event.text("EventSourceArn")?;
    let queue = queues.iter().find(|queue| queue_arn(&queue.name) == arn);
    let queue = queue
        .ok_or_else(|| invalid(event.at("EventSourceArn"), format!("`{arn}` is no queue of the template")))?;
    let batch_size = event.number("BatchSize")?.unwrap_or(DEFAULT_QUEUE_BATCH);
    if !(1..=10).contains(&batch_size) {
        return Err(invalid(event.at("BatchSize"), format!("`{batch_size}` is not between 1 and 10")));
    }
    let concurrency = event.number("ScalingConfig/MaximumConcurrency")?.unwrap_or(DEFAULT_CONCURRENCY);
    if !(2..=1_000).contains(&concurrency) {
        let problem = format!("`{concurrency}` is not between 2 and 1000");
        return Err(invalid(event.at("ScalingConfig/MaximumConcurrency"), problem));
    }
    let read = QueueEvent {
        name: mapping.id.clone(),
        queue: queue.clone(),
        batch_size,
        concurrency,
        reports_item_failures: event.reports_item_failures()?,
    };
    let function = event.text("FunctionName")?;
    Ok((!event.off()).then_some((function, read)))
}

/// `rate(5 minutes)` as a duration. AWS is strict about the plural.
fn rate(expression: &str) -> Option<Duration> {
    let (count, unit) = expression.strip_prefix("rate(")?.strip_suffix(')')?.split_once(' ')?;
    let count: u32 = count.parse().ok().filter(|count| *count > 0)?;
    let seconds = match (count, unit) {
        (1, "minute") | (2.., "minutes") => 60,
        (1, "hour") | (2.., "hours") => 3_600,
        (1, "day") | (2.., "days") => 86_400,
        _ => return None,
    };
    Some(Duration::from_secs(seconds) * count)
}

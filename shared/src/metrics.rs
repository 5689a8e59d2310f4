//! What is measured, and the line of the log that says it: CloudWatch's embedded metric format. Pure;
//! [`crate::telemetry`] writes the lines.
//!
//! A request, or a job, is one line with its ids, and that line names the metrics that CloudWatch takes out of
//! it. It holds nothing that anybody wrote. A metric is told apart by dimensions with few values by their nature,
//! since each value is a metric of its own that is paid for: whose a request is stands in the line, and is none.
//!
//! <https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html>

use serde_json::{Map, Value, json};

use crate::clock::Timestamp;
use crate::credential::CredentialId;
use crate::error::Code;
use crate::ledger::Record;
use crate::meter::Limit;
use crate::pricing::Usage;
use crate::scope::RequestId;
use crate::tenant::TenantId;
use crate::trace::Trace;

/// Everything that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// From a request's arrival in the function to its end, streams included.
    Latency,
    /// From a question's arrival to the first word of its answer.
    TimeToFirstByte,
    /// Input that no cache held.
    InputTokens,
    /// Output.
    OutputTokens,
    /// Input read from the provider's cache.
    CacheReadTokens,
    /// Input written to the provider's cache.
    CacheCreationTokens,
    /// What was embedded.
    EmbeddingTokens,
    /// What all that costs.
    CostNanoUsd,
    /// Requests that passed the gate.
    Admitted,
    /// Requests that a limit refused.
    Refused,
    /// Requests that failed through no fault of the caller's.
    Failed,
    /// Searches that the reranker did not answer, and that were shown in their own order.
    RerankFailures,
    /// Records and decisions of another tenant that a request was given. It must never happen.
    IsolationAlerts,
    /// Admitted requests that are not settled, of all tenants.
    OpenTickets,
    /// Requests that were never settled, and are charged at their bounds.
    AbortedTickets,
    /// How long a record waited for the audit log.
    ExportLag,
}

/// What metrics are told apart by. All its values are known beforehand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dimension {
    /// Method and path as the API declares them, or `authorizer`.
    Route,
    /// The limit that refused.
    Limit,
}

impl Metric {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::Latency,
        Self::TimeToFirstByte,
        Self::InputTokens,
        Self::OutputTokens,
        Self::CacheReadTokens,
        Self::CacheCreationTokens,
        Self::EmbeddingTokens,
        Self::CostNanoUsd,
        Self::Admitted,
        Self::Refused,
        Self::Failed,
        Self::RerankFailures,
        Self::IsolationAlerts,
        Self::OpenTickets,
        Self::AbortedTickets,
        Self::ExportLag,
    ];

    /// Its name, as alarms and the dashboard know it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Latency => "Latency",
            Self::TimeToFirstByte => "TimeToFirstByte",
            Self::InputTokens => "InputTokens",
            Self::OutputTokens => "OutputTokens",
            Self::CacheReadTokens => "CacheReadTokens",
            Self::CacheCreationTokens => "CacheCreationTokens",
            Self::EmbeddingTokens => "EmbeddingTokens",
            Self::CostNanoUsd => "CostNanoUsd",
            Self::Admitted => "Admitted",
            Self::Refused => "Refused",
            Self::Failed => "Failed",
            Self::RerankFailures => "RerankFailures",
            Self::IsolationAlerts => "IsolationAlerts",
            Self::OpenTickets => "OpenTickets",
            Self::AbortedTickets => "AbortedTickets",
            Self::ExportLag => "ExportLag",
        }
    }

    /// Its unit, by CloudWatch's name.
    pub const fn unit(self) -> &'static str {
        match self {
            Self::Latency | Self::TimeToFirstByte | Self::ExportLag => "Milliseconds",
            Self::CostNanoUsd => "None",
            _ => "Count",
        }
    }

    /// The sets of dimensions that it is kept under.
    pub const fn dimensions(self) -> &'static [&'static [Dimension]] {
        match self {
            Self::Latency | Self::TimeToFirstByte => &[&[Dimension::Route]],
            Self::Refused => &[&[Dimension::Limit]],
            _ => &[&[]],
        }
    }
}

impl Dimension {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Route => "Route",
            Self::Limit => "Limit",
        }
    }
}

/// A line of the log.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    at: Timestamp,
    fields: Map<String, Value>,
    metrics: Vec<Metric>,
}

impl Line {
    /// A line that says `message`. Fields are to be ids, names of our own, and numbers.
    pub fn new(message: &'static str, at: Timestamp) -> Self {
        let fields = [("level", "INFO".into()), ("message", message.into()), ("timestamp", at.to_string())];
        let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
        Self { at, fields, metrics: Vec::new() }
    }

    /// The line with one more field; without it, if there is nothing to say.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        let value = value.into();
        if !value.is_null() {
            self.fields.insert(name.to_owned(), value);
        }
        self
    }

    /// The line with a value of that dimension.
    #[must_use]
    pub fn of(self, dimension: Dimension, value: impl Into<String>) -> Self {
        self.with(dimension.name(), value.into())
    }

    /// The line with one more metric. Those that depend on a dimension need a value of it.
    #[must_use]
    pub fn measure(mut self, metric: Metric, value: u64) -> Self {
        self.metrics.push(metric);
        self.with(metric.name(), value)
    }

    /// The line as it is written, with its metrics in that namespace of CloudWatch's.
    pub fn render(mut self, namespace: &str) -> String {
        let mut directives: Vec<(&[&[Dimension]], Vec<Value>)> = Vec::new();
        for metric in std::mem::take(&mut self.metrics) {
            let definition = json!({ "Name": metric.name(), "Unit": metric.unit() });
            match directives.iter_mut().find(|(sets, _)| *sets == metric.dimensions()) {
                Some((_, metrics)) => metrics.push(definition),
                None => directives.push((metric.dimensions(), vec![definition])),
            }
        }
        let directives: Vec<Value> = directives
            .into_iter()
            .map(|(sets, metrics)| {
                let set = |set: &&[Dimension]| set.iter().map(|d| d.name()).collect::<Vec<_>>();
                let sets: Vec<_> = sets.iter().map(set).collect();
                json!({ "Namespace": namespace, "Dimensions": sets, "Metrics": metrics })
            })
            .collect();
        if !directives.is_empty() {
            let metadata = json!({ "Timestamp": self.at.as_millis(), "CloudWatchMetrics": directives });
            self.fields.insert("_aws".to_owned(), metadata);
        }
        Value::Object(self.fields).to_string()
    }
}

/// A request as it came in.
#[derive(Clone, Debug)]
pub struct Arrived {
    /// Its id.
    pub request_id: RequestId,
    /// Its method.
    pub method: String,
    /// Its path as the API declares it.
    pub route: String,
    /// Its place in a trace, if it is traced.
    pub trace: Option<Trace>,
    /// When it came.
    pub at: Timestamp,
}

/// What is measured of a request on its way.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Whose it is, and the key or issuer that says so.
    pub caller: Option<(TenantId, CredentialId)>,
    /// Whether it passed the gate.
    pub admitted: bool,
    /// The limit that refused it.
    pub refused_by: Option<Limit>,
    /// How often it was given something of another tenant.
    pub isolation_alerts: u64,
    /// How often the reranker did not answer.
    pub rerank_failures: u64,
    /// How long it took to the first word of its answer.
    pub first_byte_ms: Option<u64>,
    /// What it was charged.
    pub charged: Option<Charged>,
}

/// What a request was charged, as the ledger has it.
#[derive(Clone, Debug)]
pub struct Charged {
    ticket: Option<u64>,
    model: Option<String>,
    usage: Usage,
    embedding_model: Option<String>,
    embedding_tokens: u64,
    rerank_model: Option<String>,
    unreported_tokens: u64,
    cost_nano_usd: u64,
}

impl From<&Record> for Charged {
    fn from(record: &Record) -> Self {
        Self {
            ticket: record.ticket.map(|ticket| ticket.0),
            model: record.model.clone(),
            usage: record.usage,
            embedding_model: record.embedding_model.clone(),
            embedding_tokens: record.embedding_tokens.0,
            rerank_model: record.rerank_model.clone(),
            unreported_tokens: record.unreported_tokens.0,
            cost_nano_usd: record.cost_nano_usd.0,
        }
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// The status of its answer.
    pub status: http::StatusCode,
    /// The error that it was answered with, if it was one.
    pub error: Option<Code>,
}

impl Ending {
    /// Whether it failed through no fault of the caller's.
    fn failed(self) -> bool {
        self.status.is_server_error() || self.error.is_some_and(|code| code.status().is_server_error())
    }
}

/// The line of a request that has ended.
pub fn line(arrived: &Arrived, measured: &Measured, ending: Ending, now: Timestamp) -> Line {
    let message = if ending.error.is_some() { "Request refused" } else { "Request answered" };
    let (tenant, key) = measured.caller.as_ref().map(|(t, k)| (t.to_string(), k.to_string())).unzip();
    let mut line = Line::new(message, now)
        .with("request.id", arrived.request_id.to_string())
        .with("trace.id", arrived.trace.as_ref().map(Trace::root))
        .with("tenant.id", tenant)
        .with("key.id", key)
        .with("http.method", arrived.method.as_str())
        .with("http.route", arrived.route.as_str())
        .with("http.status", ending.status.as_u16())
        .with("error.code", ending.error.map(|code| json!(code)))
        .of(Dimension::Route, format!("{} {}", arrived.method, arrived.route))
        .measure(Metric::Latency, now.millis_since(arrived.at));
    if let Some(ms) = measured.first_byte_ms {
        line = line.measure(Metric::TimeToFirstByte, ms);
    }
    if measured.admitted {
        line = line.measure(Metric::Admitted, 1);
    }
    if let Some(limit) = measured.refused_by {
        line = line.of(Dimension::Limit, limit.name()).measure(Metric::Refused, 1);
    }
    if ending.failed() {
        line = line.measure(Metric::Failed, 1);
    }
    if measured.isolation_alerts > 0 {
        line = line.measure(Metric::IsolationAlerts, measured.isolation_alerts);
    }
    if measured.rerank_failures > 0 {
        line = line.measure(Metric::RerankFailures, measured.rerank_failures);
    }
    match &measured.charged {
        Some(charged) => charged.measured(line),
        None => line,
    }
}

impl Charged {
    fn measured(&self, line: Line) -> Line {
        let mut line = line
            .with("ticket", self.ticket)
            .with("model", self.model.as_deref())
            .with("embedding_model", self.embedding_model.as_deref())
            .with("rerank_model", self.rerank_model.as_deref())
            .with("tokens.unreported", Some(self.unreported_tokens).filter(|tokens| *tokens > 0))
            .measure(Metric::CostNanoUsd, self.cost_nano_usd);
        if self.model.is_some() {
            line = line
                .measure(Metric::InputTokens, self.usage.input_tokens.0)
                .measure(Metric::OutputTokens, self.usage.output_tokens.0)
                .measure(Metric::CacheReadTokens, self.usage.cache_read_input_tokens.0)
                .measure(Metric::CacheCreationTokens, self.usage.cache_creation_input_tokens.0);
        }
        if self.embedding_model.is_some() {
            line = line.measure(Metric::EmbeddingTokens, self.embedding_tokens);
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_millis(1_795_000_000_000 + ms)
    }

    fn arrived() -> Arrived {
        Arrived {
            request_id: RequestId::from("r-1".to_owned()),
            method: "POST".to_owned(),
            route: "/v1/chat".to_owned(),
            trace: "Root=1-5759e988-bd862e3fe1be46a994272793;Sampled=1".parse().ok(),
            at: at(0),
        }
    }

    #[test]
    fn a_line_is_a_document_of_the_embedded_metric_format() {
        let measured = Measured {
            refused_by: Some(Limit::Day),
            isolation_alerts: 2,
            first_byte_ms: Some(7),
            ..Measured::default()
        };
        let ending =
            Ending { status: http::StatusCode::TOO_MANY_REQUESTS, error: Some(Code::TokenBudgetExceeded) };
        let text = line(&arrived(), &measured, ending, at(12)).render("bulkhead");
        assert!(!text.contains('\n'));
        let line: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            line,
            json!({
                "_aws": {
                    "Timestamp": 1_795_000_000_012_u64,
                    "CloudWatchMetrics": [
                        {
                            "Namespace": "bulkhead",
                            "Dimensions": [["Route"]],
                            "Metrics": [
                                {"Name": "Latency", "Unit": "Milliseconds"},
                                {"Name": "TimeToFirstByte", "Unit": "Milliseconds"},
                            ],
                        },
                        {
                            "Namespace": "bulkhead",
                            "Dimensions": [["Limit"]],
                            "Metrics": [{"Name": "Refused", "Unit": "Count"}],
                        },
                        {
                            "Namespace": "bulkhead",
                            "Dimensions": [[]],
                            "Metrics": [{"Name": "IsolationAlerts", "Unit": "Count"}],
                        },
                    ],
                },
                "timestamp": at(12).to_string(),
                "level": "INFO",
                "message": "Request refused",
                "request.id": "r-1",
                "trace.id": "1-5759e988-bd862e3fe1be46a994272793",
                "http.method": "POST",
                "http.route": "/v1/chat",
                "http.status": 429,
                "error.code": "token_budget_exceeded",
                "Route": "POST /v1/chat",
                "Limit": "tokens_per_day",
                "Latency": 12,
                "TimeToFirstByte": 7,
                "Refused": 1,
                "IsolationAlerts": 2,
            })
        );
    }

    #[test]
    fn a_stream_that_breaks_off_has_failed_although_its_status_is_another() {
        let metrics = |status, error| {
            let ending = Ending { status: http::StatusCode::from_u16(status).unwrap(), error };
            line(&arrived(), &Measured::default(), ending, at(1)).metrics
        };
        assert_eq!(metrics(200, None), [Metric::Latency]);
        assert_eq!(metrics(404, Some(Code::NotFound)), [Metric::Latency]);
        assert_eq!(metrics(503, Some(Code::Unavailable)), [Metric::Latency, Metric::Failed]);
        assert_eq!(metrics(200, Some(Code::ModelUnavailable)), [Metric::Latency, Metric::Failed]);
    }

    #[test]
    fn every_metric_is_among_all_of_them_once() {
        let mut names = Metric::ALL.map(Metric::name);
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
        for metric in Metric::ALL {
            let text = Line::new("x", at(0)).measure(metric, 1).render("n");
            assert!(text.contains(&format!("\"{}\":1", metric.name())), "{text}");
        }
    }
}

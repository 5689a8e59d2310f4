//! A tenant's month as it is shown. Pure.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;
use shared::limits::Limits;
use shared::meter::{BillingMonth, Standing};
use shared::tenant::TenantId;
use shared::usage::{Bill, Histogram, Sums};

/// The first line of a table.
pub(crate) const CSV_HEADER: &str = "tenant_id,month,model,requests,input_tokens,output_tokens,\
    cache_read_input_tokens,cache_creation_input_tokens,embedding_tokens,unreported_tokens,cost_nano_usd,feedback_up,feedback_down\r\n";

/// A month: its sums, its models, and what is left now.
#[derive(Debug, Serialize)]
pub(crate) struct View {
    tenant_id: TenantId,
    month: String,
    #[serde(flatten)]
    all: Sums,
    models: BTreeMap<String, Sums>,
    latency_ms: Latency,
    limits: Limits,
    remaining: Left,
    in_flight: u64,
}

#[derive(Debug, Serialize)]
struct Latency {
    p50: Option<u64>,
    p90: Option<u64>,
    p99: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Left {
    requests_per_minute: u64,
    tokens_per_day: u64,
    monthly_token_budget: u64,
    max_concurrent: u64,
}

impl View {
    pub(crate) fn new(
        tenant_id: TenantId,
        month: BillingMonth,
        bill: &Bill,
        limits: &Limits,
        standing: &Standing,
    ) -> Self {
        let all = bill.month(month);
        Self {
            tenant_id,
            month: month.to_string(),
            latency_ms: latency(&all.latency),
            models: bill.0.iter().map(|((_, model), sums)| (model.clone(), sums.clone())).collect(),
            all,
            limits: limits.clone(),
            remaining: Left {
                requests_per_minute: standing.requests.remaining,
                tokens_per_day: standing.day_remaining.0,
                monthly_token_budget: standing.month_remaining.0,
                max_concurrent: u64::from(limits.max_concurrent).saturating_sub(standing.in_flight),
            },
            in_flight: standing.in_flight,
        }
    }

    /// One line for each model. Nothing in it needs quoting: names of tenants, models and numbers.
    pub(crate) fn write_csv(&self, text: &mut String) {
        for (model, sums) in &self.models {
            let numbers = [
                sums.requests,
                sums.usage.input_tokens.0,
                sums.usage.output_tokens.0,
                sums.usage.cache_read_input_tokens.0,
                sums.usage.cache_creation_input_tokens.0,
                sums.embedding_tokens.0,
                sums.unreported_tokens.0,
                sums.cost_nano_usd.0,
                sums.feedback_up,
                sums.feedback_down,
            ]
            .map(|number| number.to_string())
            .join(",");
            // Writing to a string does not fail.
            let _ = write!(text, "{},{},{model},{numbers}\r\n", self.tenant_id, self.month);
        }
    }
}

fn latency(histogram: &Histogram) -> Latency {
    Latency { p50: histogram.quantile(0.5), p90: histogram.quantile(0.9), p99: histogram.quantile(0.99) }
}

//! `cost`: what a deployment costs by its list prices, and which limit it meets next. Pure: counts that were
//! measured, assumptions and prices come in as data, integers come out.
//!
//! What a model and its embeddings cost is not in it: that is metered to the nano-dollar for each tenant
//! (`usage`). Nor is what the vector clusters cost, whoever runs them.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};
use shared::placement::CAPACITY;
use shared::units::NanoUsd;

use crate::command::Cost;
use crate::table::Table;

/// A month, of which there are twelve in 365 days.
const MONTH_S: u64 = 365 * 24 * 3_600 / 12;
const MONTH_MINUTES: u64 = MONTH_S / 60;
/// Days of a month, for what is kept for days.
const MONTH_DAYS: u64 = 30;
const GB: u128 = 1_000_000_000;
/// Quantities are in millionths, and what was measured in thousandths.
const MICRO: u128 = 1_000_000;
const MILLI: u128 = 1_000;
/// The functions that run every minute: the reconciler, the webhooks, the eraser. Two of them read all meters.
const MINUTELY: u64 = 3;
const SCANS: u64 = 2;
/// What one of them takes, and what it takes more for a thousand tenants, in milliseconds.
const RUN_MS: (u64, u64) = (50, 30);
/// A DynamoDB table asks for its key every five minutes.
const KEY_MINUTES: u64 = 5;
/// Lambda asks a queue by five connections, each of which waits 20 seconds.
const QUEUE_POLLS_A_MINUTE: u64 = 15;
/// Of what is traced: the first in each second, and so much of the rest, in percent.
const TRACED_PERCENT: u64 = 5;
/// Secrets that chat reads when it starts.
const SECRETS_READ: u64 = 2;
/// Bytes of a read unit where a read need not be consistent.
const READ_UNIT: u64 = 8_192;

/// The prices.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PriceList {
    /// For which region.
    pub region: String,
    /// Of which day.
    pub as_of: String,
    /// What is to be known of them.
    pub note: String,
    /// The prices.
    pub prices: Prices,
}

/// Each of them.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the data says what they are")]
pub struct Prices {
    pub lambda_gb_seconds: Price,
    pub lambda_requests: Price,
    pub lambda_environments_gb: Price,
    pub api_gateway_requests: Price,
    pub transfer_out_gb: Price,
    pub dynamodb_write_units: Price,
    pub dynamodb_read_units: Price,
    pub dynamodb_gb_months: Price,
    pub dynamodb_pitr_gb_months: Price,
    pub s3_puts: Price,
    pub s3_gb_months: Price,
    pub logs_ingested_gb: Price,
    pub logs_kept_gb_months: Price,
    pub alarm_metrics: Price,
    pub metrics: Price,
    pub dashboards: Price,
    pub traces: Price,
    pub sqs_requests: Price,
    pub schedules: Price,
    pub kms_requests: Price,
    pub secrets: Price,
    pub secrets_calls: Price,
}

/// A price.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// So much,
    pub nano_usd: NanoUsd,
    /// for so many
    pub per: u64,
    /// of these.
    pub unit: String,
    /// Who says so.
    pub source: String,
}

impl Price {
    /// The price of so many millionths of a unit, rounded up.
    fn of(&self, quantity_micro: u128) -> NanoUsd {
        let nano = (quantity_micro * u128::from(self.nano_usd.0)).div_ceil(u128::from(self.per) * MICRO);
        NanoUsd(u64::try_from(nano).unwrap_or(u64::MAX))
    }
}

/// What a chat takes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Counted and measured.
    pub measured: Measured,
    /// Not measured: it depends on who uses it, and how.
    pub assumed: Assumed,
}

/// What was measured, of one chat if nothing else is said.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "docs/cost.md explains each")]
pub struct Measured {
    pub as_of: String,
    pub by: String,
    pub chat_memory_mb: u64,
    pub other_memory_mb: u64,
    pub chat_own_ms: u64,
    pub write_units_milli: u64,
    pub read_units_milli: u64,
    pub object_write_units_milli: u64,
    pub object_read_units_milli: u64,
    pub authorization_read_units_milli: u64,
    pub answer_bytes: u64,
    pub logged_bytes: u64,
    pub stored_bytes: u64,
    pub audit_bytes: u64,
    pub meter_bytes: u64,
    pub tables: u64,
    pub alarm_metrics: u64,
    pub metric_series: u64,
}

/// What was assumed.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "docs/cost.md explains each")]
pub struct Assumed {
    pub chats_per_tenant: u64,
    pub model_ms: u64,
    pub authorizer_ms: u64,
    pub export_ms: u64,
    pub start_ms: u64,
    pub chats_per_authorization: u64,
    pub chats_per_environment: u64,
    pub chats_per_object: u64,
    pub kept_days: u64,
    pub audit_months: u64,
    pub log_days: u64,
    pub busiest_over_mean: u64,
    pub at_work_percent: u64,
    pub secrets: u64,
}

/// A part of the bill.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// The service.
    pub service: &'static str,
    /// What it is asked for.
    pub what: &'static str,
    /// How much of it, in millionths.
    pub quantity_micro: u128,
    /// What it costs.
    pub cost_nano_usd: NanoUsd,
}

/// A month of so many tenants.
#[derive(Clone, Debug, Serialize)]
pub struct Month {
    /// The tenants.
    pub tenants: u64,
    /// Their chats.
    pub chats: u64,
    /// The bill.
    pub lines: Vec<Line>,
    /// Its sum.
    pub cost_nano_usd: NanoUsd,
    /// What there is of each limit, and how much is needed in the busiest hour.
    pub limits: Vec<Limit>,
}

/// A limit.
#[derive(Clone, Debug, Serialize)]
pub struct Limit {
    /// Of what.
    pub what: &'static str,
    /// How much there is.
    pub there_is: u64,
    /// How much is needed, rounded up.
    pub needed: u64,
    /// What to do when it comes near.
    pub lever: &'static str,
}

impl Limit {
    /// How much of it is needed, in thousandths.
    fn share_milli(&self) -> u64 {
        self.needed.saturating_mul(1_000) / self.there_is.max(1)
    }
}

/// The price list and the workload that are compiled in.
///
/// # Errors
/// If a file is malformed.
pub fn known() -> serde_json::Result<(PriceList, Workload)> {
    Ok((
        serde_json::from_str(include_str!("../data/prices.json"))?,
        serde_json::from_str(include_str!("../data/workload.json"))?,
    ))
}

/// What so many chats take, whoever's they are.
fn of_chats(prices: &Prices, workload: &Workload, chats: u64) -> Vec<Line> {
    let Workload { measured: m, assumed: a } = workload;
    let authorizations = chats.div_ceil(a.chats_per_authorization);
    let environments = chats.div_ceil(a.chats_per_environment);
    let objects = chats.div_ceil(a.chats_per_object);
    let [chats, authorizations, environments, objects] =
        [chats, authorizations, environments, objects].map(u128::from);
    // A millisecond of a megabyte is a 1,024th of a thousandth of a GB-second.
    let gb_seconds =
        |times: u128, memory_mb: u64, ms: u64| times * u128::from(memory_mb * ms) * MILLI / 1_024;
    let beside = gb_seconds(authorizations, m.other_memory_mb, a.authorizer_ms)
        + gb_seconds(objects, m.other_memory_mb, a.export_ms)
        + gb_seconds(environments, m.chat_memory_mb, a.start_ms);
    let gb = |each: u64, months_days: u64| {
        chats * u128::from(each) * u128::from(months_days) * MICRO / (GB * u128::from(MONTH_DAYS))
    };
    let answering = gb_seconds(chats, m.chat_memory_mb, m.chat_own_ms + a.model_ms);
    let units = |times: u128, each_milli: u64| times * u128::from(each_milli) * MILLI;
    let writes = units(chats, m.write_units_milli) + units(objects, m.object_write_units_milli);
    let reads = units(chats, m.read_units_milli)
        + units(objects, m.object_read_units_milli)
        + units(authorizations, m.authorization_read_units_milli);
    let items = gb(m.stored_bytes, a.kept_days);
    let line = |service, what, quantity_micro, price: &Price| Line {
        service,
        what,
        quantity_micro,
        cost_nano_usd: price.of(quantity_micro),
    };
    vec![
        line("Lambda", "GB-seconds, answering", answering, &prices.lambda_gb_seconds),
        line("Lambda", "GB-seconds, beside it", beside, &prices.lambda_gb_seconds),
        line("Lambda", "invocations", (chats + authorizations + objects) * MICRO, &prices.lambda_requests),
        line(
            "Lambda",
            "GB of tenants' environments",
            environments * u128::from(m.chat_memory_mb) * MICRO / 1_024,
            &prices.lambda_environments_gb,
        ),
        line("API Gateway", "requests", chats * MICRO, &prices.api_gateway_requests),
        line("API Gateway", "GB out", gb(m.answer_bytes, MONTH_DAYS), &prices.transfer_out_gb),
        line("DynamoDB", "write units", writes, &prices.dynamodb_write_units),
        line("DynamoDB", "read units", reads, &prices.dynamodb_read_units),
        line("DynamoDB", "GB-months", items, &prices.dynamodb_gb_months),
        line("DynamoDB", "GB-months to restore", items, &prices.dynamodb_pitr_gb_months),
        line("S3", "PUTs", objects * MICRO, &prices.s3_puts),
        line("S3", "GB-months", gb(m.audit_bytes, a.audit_months * MONTH_DAYS), &prices.s3_gb_months),
        line("Logs", "GB in", gb(m.logged_bytes, MONTH_DAYS), &prices.logs_ingested_gb),
        line("Logs", "GB-months", gb(m.logged_bytes, a.log_days), &prices.logs_kept_gb_months),
        line("X-Ray", "traces", (traced(chats) + traced(objects)) * MICRO, &prices.traces),
        line(
            "Secrets Manager",
            "calls",
            environments * u128::from(SECRETS_READ) * MICRO,
            &prices.secrets_calls,
        ),
    ]
}

/// How many traces of so many within a month are kept at most, if they come one by one.
fn traced(of: u128) -> u128 {
    let first = of.min(u128::from(MONTH_S));
    first + ((of - first) * u128::from(TRACED_PERCENT)).div_ceil(100)
}

/// What it takes to be there for so many tenants, whether they ask or not.
fn of_being_there(prices: &Prices, workload: &Workload, tenants: u64) -> Vec<Line> {
    let Workload { measured: m, assumed: a } = workload;
    let runs = u128::from(MONTH_MINUTES * MINUTELY);
    let run_ms = RUN_MS.0 + tenants * RUN_MS.1 / 1_000;
    let scans = u128::from(MONTH_MINUTES * SCANS);
    let scanned = u128::from((tenants * m.meter_bytes).div_ceil(READ_UNIT));
    let keys = u128::from(MONTH_MINUTES / KEY_MINUTES * m.tables);
    let line = |service, what, quantity_micro, price: &Price| Line {
        service,
        what,
        quantity_micro,
        cost_nano_usd: price.of(quantity_micro),
    };
    vec![
        line(
            "Schedules",
            "GB-seconds",
            runs * u128::from(m.other_memory_mb * run_ms) * MILLI / 1_024,
            &prices.lambda_gb_seconds,
        ),
        line("Schedules", "invocations", runs * MICRO, &prices.lambda_requests),
        line("Schedules", "of the scheduler", runs * MICRO, &prices.schedules),
        line("Schedules", "read units", scans * scanned * MICRO, &prices.dynamodb_read_units),
        line("KMS", "requests of AWS's own key", keys * MICRO, &prices.kms_requests),
        line("Secrets Manager", "secrets", u128::from(a.secrets) * MICRO, &prices.secrets),
        line("CloudWatch", "metrics of alarms", u128::from(m.alarm_metrics) * MICRO, &prices.alarm_metrics),
        line("CloudWatch", "metrics of the functions", u128::from(m.metric_series) * MICRO, &prices.metrics),
        line("CloudWatch", "the dashboard", MICRO, &prices.dashboards),
        line("X-Ray", "traces of schedules", traced(runs) * MICRO, &prices.traces),
        line(
            "SQS",
            "polls of the uploads' queue",
            u128::from(MONTH_MINUTES * QUEUE_POLLS_A_MINUTE) * MICRO,
            &prices.sqs_requests,
        ),
    ]
}

/// What is needed of each limit in the busiest hour. AWS's own are those of a new account; most are raised on
/// request.
fn limits(workload: &Workload, tenants: u64, chats: u64) -> Vec<Limit> {
    let Workload { measured: m, assumed: a } = workload;
    let busiest = |times: u64| (times * a.busiest_over_mean).div_ceil(MONTH_S);
    let at_once = (chats * a.busiest_over_mean * (m.chat_own_ms + a.model_ms)).div_ceil(MONTH_S * 1_000);
    let cells = tenants.div_ceil(u64::from(CAPACITY));
    let of_one = (a.chats_per_tenant * a.busiest_over_mean * 2).div_ceil(MONTH_S);
    let limit = |what, there_is, needed, lever| Limit { what, there_is, needed, lever };
    vec![
        limit(
            "API Gateway: requests a second, in the template",
            1_000,
            busiest(chats),
            "raise the template's throttle, up to the account's 10,000; then ask for more, or deploy to a second region",
        ),
        limit(
            "Lambda: requests at once",
            1_000,
            at_once,
            "ask for more concurrency: tens of thousands are given",
        ),
        limit(
            "Lambda: tenants' environments",
            2_500,
            (tenants * a.at_work_percent * 2).div_ceil(100),
            "there are 2,500 for each 1,000 of concurrency, so ask for more; or TenantIsolation=off, which has to be chosen before the first deployment",
        ),
        limit(
            "DynamoDB: writes a second of one meter",
            1_000,
            of_one,
            "none is needed: a tenant's own limit of 20,000 requests a minute comes first",
        ),
        limit(
            "DynamoDB: write units a second, new tables",
            4_000,
            busiest(chats * (m.write_units_milli + m.object_write_units_milli) / 1_000),
            "set the tables' warm throughput before the rush; on demand they double by themselves, to the account's 40,000",
        ),
        limit(
            "Vector store: cells that fit QdrantCells",
            60,
            cells,
            "the list has to fit the functions' 4 KB of environment: shorter addresses, larger cells (capacity=), then a second deployment",
        ),
        limit(
            "STS: sessions a second",
            600,
            busiest(chats / a.chats_per_environment),
            "ask for more (600 is from memory, not verified)",
        ),
    ]
}

/// A month of so many tenants.
pub fn month(prices: &Prices, workload: &Workload, tenants: u64) -> Month {
    let chats = tenants.saturating_mul(workload.assumed.chats_per_tenant);
    let mut lines = of_chats(prices, workload, chats);
    lines.extend(of_being_there(prices, workload, tenants));
    let cost_nano_usd = sum(&lines);
    Month { tenants, chats, cost_nano_usd, limits: limits(workload, tenants, chats), lines }
}

fn sum<'a>(lines: impl IntoIterator<Item = &'a Line>) -> NanoUsd {
    lines.into_iter().fold(NanoUsd(0), |sum, line| sum + line.cost_nano_usd)
}

/// Dollars to so many digits, rounded up.
fn dollars(money: NanoUsd, digits: u32) -> String {
    let unit = 10_u64.pow(9 - digits);
    let units = money.0.div_ceil(unit);
    let whole = 10_u64.pow(digits);
    format!("{}.{:0width$}", units / whole, units % whole, width = digits as usize)
}

/// Carries out the command.
///
/// # Errors
/// If a file that is compiled in is malformed, or nothing can be written.
pub fn run(wanted: &Cost, out: &mut impl Write) -> io::Result<()> {
    let (list, mut workload) = known()?;
    let assumed = &mut workload.assumed;
    assumed.chats_per_tenant = wanted.chats.unwrap_or(assumed.chats_per_tenant);
    assumed.model_ms = wanted.model_ms.unwrap_or(assumed.model_ms);
    let months: Vec<Month> =
        wanted.tenants.iter().map(|tenants| month(&list.prices, &workload, *tenants)).collect();
    if wanted.json {
        let thousand = of_chats(&list.prices, &workload, 1_000);
        let all = serde_json::json!({ "thousand_chats": thousand, "months": months });
        return writeln!(out, "{all}");
    }
    let PriceList { region, as_of, .. } = &list;
    let Assumed { chats_per_tenant, model_ms, authorizer_ms, export_ms, start_ms, .. } = &workload.assumed;
    writeln!(
        out,
        "List prices of {region}, {as_of}, to be checked; without the model, its embeddings and the vector store."
    )?;
    writeln!(
        out,
        "{chats_per_tenant} chats a tenant and month, of which the model takes {model_ms} ms each."
    )?;
    writeln!(
        out,
        "Assumed, not measured: {authorizer_ms} ms of the authorizer, {export_ms} ms of an export, {start_ms} ms of a start.\n"
    )?;
    thousand(&list, &workload, out)?;
    bills("$ a month", &months, |_, sum| dollars(sum, 2), out)?;
    bills("$ a tenant and month", &months, |month, sum| dollars(each(month, sum), 4), out)?;
    next(&months, out)
}

fn thousand(list: &PriceList, workload: &Workload, out: &mut impl Write) -> io::Result<()> {
    let lines = of_chats(&list.prices, workload, 1_000);
    let mut table = Table::new(["1,000 chats", "of", "quantity", "$"]);
    for line in &lines {
        // To four digits.
        let quantity = line.quantity_micro.div_ceil(100);
        let quantity = format!("{}.{:04}", quantity / 10_000, quantity % 10_000);
        table.row([line.service.to_owned(), line.what.to_owned(), quantity, dollars(line.cost_nano_usd, 6)]);
    }
    table.row(["together".to_owned(), String::new(), "-".to_owned(), dollars(sum(&lines), 6)]);
    table.write(out)?;
    writeln!(out)
}

/// The part of one of a month's tenants.
fn each(month: &Month, sum: NanoUsd) -> NanoUsd {
    NanoUsd(sum.0 / month.tenants.max(1))
}

/// A row for each service, a column for each number of tenants.
fn bills(
    heading: &str,
    months: &[Month],
    shown: impl Fn(&Month, NanoUsd) -> String,
    out: &mut impl Write,
) -> io::Result<()> {
    let mut services: Vec<&str> = Vec::new();
    for line in months.iter().flat_map(|month| &month.lines) {
        if !services.contains(&line.service) {
            services.push(line.service);
        }
    }
    let mut table = Table::of([heading].into_iter().map(str::to_owned).chain(headings(months)));
    for service in services {
        let of = |month: &Month| sum(month.lines.iter().filter(|line| line.service == service));
        table.cells(cells(service, months, |month| shown(month, of(month))));
    }
    table.cells(cells("together", months, |month| shown(month, month.cost_nano_usd)));
    table.write(out)?;
    writeln!(out)
}

fn next(months: &[Month], out: &mut impl Write) -> io::Result<()> {
    let mut table = Table::of(
        ["needed in the busiest hour", "there is"].into_iter().map(str::to_owned).chain(headings(months)),
    );
    let known = months.first().map(|month| month.limits.as_slice()).unwrap_or_default();
    for (n, limit) in known.iter().enumerate() {
        let mut row = cells(limit.what, months, |month| {
            month.limits.get(n).map(|limit| limit.needed.to_string()).unwrap_or_default()
        });
        row.insert(1, limit.there_is.to_string());
        table.cells(row);
    }
    table.write(out)?;
    for month in months {
        let Some(next) = month.limits.iter().max_by_key(|limit| limit.share_milli()) else { continue };
        writeln!(
            out,
            "\n{} tenants: next is {}, {} % used.\n  Lever: {}.",
            month.tenants,
            next.what,
            next.share_milli().div_ceil(10),
            next.lever
        )?;
        for beyond in
            month.limits.iter().filter(|limit| limit.share_milli() > 1_000 && limit.what != next.what)
        {
            writeln!(out, "  Also beyond it: {}.\n  Lever: {}.", beyond.what, beyond.lever)?;
        }
    }
    Ok(())
}

fn headings(months: &[Month]) -> impl Iterator<Item = String> {
    months.iter().map(|month| format!("{} tenants", month.tenants))
}

fn cells(first: &str, months: &[Month], cell: impl Fn(&Month) -> String) -> Vec<String> {
    std::iter::once(first.to_owned()).chain(months.iter().map(cell)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_are_well_formed_and_each_price_says_whose_it_is() {
        let (list, workload) = known().unwrap();
        assert!(list.note.contains("list prices") || list.note.contains("List prices"), "{}", list.note);
        assert!(!list.prices.lambda_gb_seconds.source.is_empty());
        assert!(workload.assumed.chats_per_tenant > 0);
    }

    #[test]
    fn a_price_is_rounded_up_and_never_overflows() {
        let price = Price { nano_usd: NanoUsd(10), per: 3, unit: String::new(), source: String::new() };
        assert_eq!(price.of(3_000_000), NanoUsd(10));
        assert_eq!(price.of(1), NanoUsd(1));
        assert_eq!(price.of(0), NanoUsd(0));
        assert_eq!(price.of(u128::from(u64::MAX) * MICRO), NanoUsd(u64::MAX));
        assert_eq!(dollars(NanoUsd(1), 2), "0.01");
        assert_eq!(dollars(NanoUsd(12_345_678_901), 4), "12.3457");
    }

    #[test]
    fn a_thousand_chats_cost_a_thousand_times_one_and_being_there_is_what_is_left() {
        let (list, workload) = known().unwrap();
        let quantities = |chats| -> Vec<u128> {
            of_chats(&list.prices, &workload, chats).iter().map(|line| line.quantity_micro).collect()
        };
        let (small, large) = (quantities(1_000), quantities(1_000_000));
        for (n, (small, large)) in small.into_iter().zip(large).enumerate() {
            // What is less than a millionth is cut off.
            assert!(large >= small * 1_000 && large <= (small + 1) * 1_000, "line {n}: {small} and {large}");
        }
        let idle = Workload {
            assumed: Assumed { chats_per_tenant: 0, ..workload.assumed.clone() },
            ..workload.clone()
        };
        let nobody = month(&list.prices, &idle, 0);
        assert_eq!(nobody.cost_nano_usd, sum(&of_being_there(&list.prices, &workload, 0)));
        assert!(nobody.limits.iter().all(|limit| limit.needed == 0 || limit.what.contains("one meter")));
    }

    #[test]
    fn more_tenants_cost_more_and_less_each() {
        let (list, workload) = known().unwrap();
        let months = [10, 400, 10_000, 100_000].map(|tenants| month(&list.prices, &workload, tenants));
        for pair in months.windows(2) {
            assert!(pair[1].cost_nano_usd > pair[0].cost_nano_usd);
            let each = |month: &Month| month.cost_nano_usd.0 / month.tenants;
            assert!(each(&pair[1]) < each(&pair[0]));
        }
    }
}

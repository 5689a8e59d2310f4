//! Faults that a test asks for, as rules: what may go wrong between a function and its tables.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;

use super::call::{Call, ITEM_OPERATIONS};

const TRANSACTION: &str = "TransactWriteItems";

/// Why a rule set is refused.
#[derive(Debug, thiserror::Error)]
pub enum BadRules {
    /// It is not JSON, or not of its shape.
    #[error("the rule set cannot be read: {0}")]
    Shape(#[from] serde_json::Error),
    /// One rule says what cannot be.
    #[error("rules[{index}]: {problem}")]
    Rule {
        /// Which rule, from 0.
        index: usize,
        /// What is wrong with it.
        problem: String,
    },
}

/// What rules may name.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// The tables' names.
    pub tables: Vec<String>,
    /// The functions' binaries.
    pub functions: Vec<String>,
    /// What a table's name begins with, and may be left out.
    pub prefix: String,
}

/// What happens to one call.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Fault {
    /// Refused as too many; nothing is done.
    Throttle,
    /// Failed inside; nothing is done.
    Error,
    /// Another transaction holds the item; nothing is done.
    Conflict,
    /// The transaction is cancelled because of another; nothing is done.
    CancelConflict,
    /// Nothing is done, nothing is answered.
    Hang,
    /// Done, but nothing is answered.
    LostAnswer,
    /// Done, but answered as failed.
    LostAnswerError,
    /// Done later.
    Delay(Duration),
    /// The function's processes are killed; nothing is done.
    KillBefore(String),
    /// The call is done, the function's processes are killed, nothing is answered.
    KillAfter(String),
    /// Answered with what is another partition's: reads read there, a write's answer says that its item
    /// were of it.
    Swap(String),
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Mode {
    Throttle,
    Error,
    Conflict,
    CancelConflict,
    Hang,
    LostAnswer,
    LostAnswerError,
    Delay,
    KillBefore,
    KillAfter,
    Swap,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleSetText {
    #[serde(default)]
    seed: u64,
    rules: Vec<RuleText>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleText {
    mode: Mode,
    operation: Option<String>,
    table: Option<String>,
    contains: Option<String>,
    #[serde(default)]
    skip: u64,
    times: Option<u64>,
    probability: Option<f64>,
    delay_ms: Option<u64>,
    function: Option<String>,
    partition: Option<String>,
}

#[derive(Debug)]
struct Rule {
    fault: Fault,
    operation: Option<String>,
    table: Option<String>,
    contains: Option<String>,
    skip: u64,
    times: Option<u64>,
    probability: f64,
}

/// The rules in force.
#[derive(Debug)]
pub(super) struct RuleSet {
    /// What the chances are drawn from.
    pub seed: u64,
    rules: Vec<Rule>,
    rng: StdRng,
}

impl RuleSet {
    /// Reads a rule set.
    ///
    /// # Errors
    /// [`BadRules`]: also for a table, an operation or a function that does not exist, since a rule that
    /// can never match would make a test pass that tests nothing.
    pub(super) fn parse(text: &[u8], known: &Known) -> Result<Self, BadRules> {
        let RuleSetText { seed, rules } = serde_json::from_slice(text)?;
        let rules = rules
            .into_iter()
            .enumerate()
            .map(|(index, rule)| rule.check(known).map_err(|problem| BadRules::Rule { index, problem }))
            .collect::<Result<_, _>>()?;
        Ok(Self { seed, rules, rng: StdRng::seed_from_u64(seed) })
    }

    /// How many rules there are.
    pub(super) fn len(&self) -> usize {
        self.rules.len()
    }

    /// What happens to this call: what the first rule says that matches it, is not spent, has let its
    /// share pass, and whose chance comes up.
    fn decide(&mut self, call: &Call) -> Option<Fault> {
        for rule in self.rules.iter_mut().filter(|rule| rule.matches(call)) {
            if rule.times == Some(0) {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
                continue;
            }
            // Drawn only where there is a choice, so that a sure rule does not shift the others' chances.
            if rule.probability < 1.0 && !self.rng.random_bool(rule.probability) {
                continue;
            }
            rule.times = rule.times.map(|times| times.saturating_sub(1));
            return Some(rule.fault.clone());
        }
        None
    }
}

impl Default for RuleSet {
    fn default() -> Self {
        Self { seed: 0, rules: Vec::new(), rng: StdRng::seed_from_u64(0) }
    }
}

impl RuleText {
    fn check(self, known: &Known) -> Result<Rule, String> {
        if let Some(operation) = &self.operation
            && !ITEM_OPERATIONS.contains(&operation.as_str())
        {
            return Err(format!("operation `{operation}` is not one of {}", ITEM_OPERATIONS.join(", ")));
        }
        let table = match self.table {
            None => None,
            Some(name) => {
                let full = format!("{}{name}", known.prefix);
                let table = known.tables.iter().find(|table| **table == name || **table == full);
                Some(table.cloned().ok_or_else(|| format!("there is no table `{name}`"))?)
            }
        };
        let probability = self.probability.unwrap_or(1.0);
        if !(0.0..=1.0).contains(&probability) {
            return Err(format!("probability {probability} is not between 0 and 1"));
        }
        let kills = matches!(self.mode, Mode::KillBefore | Mode::KillAfter);
        let function = match self.function {
            None if kills => return Err("`function` is missing".to_owned()),
            None => String::new(),
            Some(_) if !kills => {
                return Err("`function` goes with kill_before and kill_after alone".to_owned());
            }
            Some(name) if !known.functions.contains(&name) => {
                return Err(format!("there is no function `{name}`"));
            }
            Some(name) => name,
        };
        let delay = match (self.mode, self.delay_ms) {
            (Mode::Delay, None) => return Err("`delay_ms` is missing".to_owned()),
            (Mode::Delay, Some(ms)) => Duration::from_millis(ms),
            (_, None) => Duration::ZERO,
            (_, Some(_)) => return Err("`delay_ms` goes with delay alone".to_owned()),
        };
        let partition = match (self.mode, self.partition) {
            (Mode::Swap, None) => return Err("`partition` is missing".to_owned()),
            (Mode::Swap, Some(partition)) => partition,
            (_, None) => String::new(),
            (_, Some(_)) => return Err("`partition` goes with swap alone".to_owned()),
        };
        let mut operation = self.operation;
        let fault = match self.mode {
            Mode::Throttle => Fault::Throttle,
            Mode::Error => Fault::Error,
            Mode::Conflict => Fault::Conflict,
            Mode::CancelConflict => match operation.get_or_insert_with(|| TRANSACTION.to_owned()).as_str() {
                TRANSACTION => Fault::CancelConflict,
                other => {
                    return Err(format!("cancel_conflict is an answer to {TRANSACTION}, not to {other}"));
                }
            },
            Mode::Hang => Fault::Hang,
            Mode::LostAnswer => Fault::LostAnswer,
            Mode::LostAnswerError => Fault::LostAnswerError,
            Mode::Delay => Fault::Delay(delay),
            Mode::KillBefore => Fault::KillBefore(function),
            Mode::KillAfter => Fault::KillAfter(function),
            Mode::Swap => Fault::Swap(partition),
        };
        let contains = self.contains;
        Ok(Rule { fault, operation, table, contains, skip: self.skip, times: self.times, probability })
    }
}

impl Rule {
    fn matches(&self, call: &Call) -> bool {
        self.operation.as_ref().is_none_or(|operation| *operation == call.operation)
            && self.table.as_ref().is_none_or(|table| call.tables.contains(table))
            && self.contains.as_ref().is_none_or(|part| {
                let part = part.as_bytes();
                part.is_empty() || call.body.windows(part.len()).any(|window| window == part)
            })
    }
}

impl Fault {
    /// What the rule calls it.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Throttle => "throttle",
            Self::Error => "error",
            Self::Conflict => "conflict",
            Self::CancelConflict => "cancel_conflict",
            Self::Hang => "hang",
            Self::LostAnswer => "lost_answer",
            Self::LostAnswerError => "lost_answer_error",
            Self::Delay(_) => "delay",
            Self::KillBefore(_) => "kill_before",
            Self::KillAfter(_) => "kill_after",
            Self::Swap(_) => "swap",
        }
    }
}

/// The rules in force, for calls that come at once.
#[derive(Debug, Default)]
pub(super) struct Faults(Mutex<RuleSet>);

impl Faults {
    pub(super) fn replace(&self, rules: RuleSet) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = rules;
    }

    pub(super) fn decide(&self, call: &Call) -> Option<Fault> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).decide(call)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn known() -> Known {
        Known {
            tables: vec!["bulkhead-notes".into(), "bulkhead-other".into()],
            functions: vec!["chat".into()],
            prefix: "bulkhead-".into(),
        }
    }

    fn rules(rules: Value) -> RuleSet {
        RuleSet::parse(rules.to_string().as_bytes(), &known()).unwrap()
    }

    fn call(operation: &str, table: &str, body: &'static str) -> Call {
        let (operation, tables) = (operation.to_owned(), vec![format!("bulkhead-{table}")]);
        Call { operation, tables, body: body.into(), ..Call::default() }
    }

    #[test]
    fn a_rule_applies_to_what_it_names() {
        let mut set = rules(json!({"rules": [
            {"mode": "error", "operation": "PutItem", "table": "notes", "contains": "red"},
            {"mode": "throttle", "table": "bulkhead-other"},
            {"mode": "cancel_conflict"},
        ]}));
        assert_eq!(set.decide(&call("PutItem", "notes", "a red pen")), Some(Fault::Error));
        assert_eq!(set.decide(&call("PutItem", "notes", "a blue pen")), None);
        assert_eq!(set.decide(&call("GetItem", "notes", "a red pen")), None);
        assert_eq!(set.decide(&call("GetItem", "other", "")), Some(Fault::Throttle));
        assert_eq!(set.decide(&call("TransactWriteItems", "notes", "")), Some(Fault::CancelConflict));
    }

    #[test]
    fn rules_skip_are_spent_and_then_leave_calls_to_the_next() {
        let mut set = rules(json!({"rules": [
            {"mode": "error", "skip": 1, "times": 2},
            {"mode": "throttle", "times": 2},
        ]}));
        let decided: Vec<_> = (0..6).map(|_| set.decide(&call("Scan", "notes", ""))).collect();
        let (error, throttle) = (Some(Fault::Error), Some(Fault::Throttle));
        assert_eq!(decided, [throttle.clone(), error.clone(), error, throttle, None, None]);
    }

    #[test]
    fn chances_are_those_of_the_seed() {
        let draw = |seed: u64| {
            let mut set = rules(json!({"seed": seed, "rules": [{"mode": "error", "probability": 0.5}]}));
            (0..64).map(|_| set.decide(&call("Scan", "notes", "")).is_some()).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        let hits = draw(7).into_iter().filter(|hit| *hit).count();
        assert!((16..48).contains(&hits), "{hits}");
    }

    #[test]
    fn what_cannot_be_is_refused_and_said() {
        let problem = |rule: Value| {
            let set = json!({"rules": [{"mode": "error"}, rule]}).to_string();
            RuleSet::parse(set.as_bytes(), &known()).unwrap_err().to_string()
        };
        for (rule, says) in [
            (json!({"mode": "explode"}), "unknown variant `explode`"),
            (json!({"mode": "error", "tabel": "notes"}), "unknown field `tabel`"),
            (json!({"mode": "error", "table": "nots"}), "rules[1]: there is no table `nots`"),
            (json!({"mode": "error", "operation": "Put"}), "rules[1]: operation `Put` is not one of"),
            (json!({"mode": "error", "probability": 1.5}), "rules[1]: probability 1.5"),
            (json!({"mode": "delay"}), "rules[1]: `delay_ms` is missing"),
            (json!({"mode": "error", "delay_ms": 1}), "rules[1]: `delay_ms` goes with delay alone"),
            (json!({"mode": "kill_after"}), "rules[1]: `function` is missing"),
            (json!({"mode": "swap"}), "rules[1]: `partition` is missing"),
            (json!({"mode": "error", "partition": "x"}), "rules[1]: `partition` goes with swap alone"),
            (json!({"mode": "kill_after", "function": "chut"}), "rules[1]: there is no function `chut`"),
            (
                json!({"mode": "cancel_conflict", "operation": "PutItem"}),
                "rules[1]: cancel_conflict is an answer",
            ),
        ] {
            assert!(problem(rule).contains(says), "{says}");
        }
    }
}

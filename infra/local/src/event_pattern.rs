//! Patterns of events, as event source mappings filter by: what they may say, and what they match.
//! Of Lambda's filter rules the ones that are used: exact values and prefixes, at any depth.

use std::collections::BTreeMap;

use serde_json::Value;

/// A pattern. An event matches if each field that is named matches one of the values listed for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Pattern(BTreeMap<String, Node>);

#[derive(Clone, Debug, PartialEq)]
enum Node {
    Fields(Pattern),
    OneOf(Vec<Test>),
}

#[derive(Clone, Debug, PartialEq)]
enum Test {
    Exact(Value),
    Prefix(String),
}

impl Pattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// A sentence that names the place in the pattern that is wrong or not known here.
    pub fn parse(pattern: &Value) -> Result<Self, String> {
        Self::at("", pattern)
    }

    fn at(at: &str, pattern: &Value) -> Result<Self, String> {
        let fields = pattern.as_object().ok_or_else(|| format!("`{at}` is not a map"))?;
        let node = |(name, value): (&String, &Value)| {
            let at = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
            let node = match value {
                Value::Array(values) => {
                    Node::OneOf(values.iter().map(|value| test(&at, value)).collect::<Result<_, _>>()?)
                }
                Value::Object(_) if !name.starts_with('$') => Node::Fields(Self::at(&at, value)?),
                _ => return Err(format!("`{at}` is neither a list of values nor a map")),
            };
            Ok((name.clone(), node))
        };
        fields.iter().map(node).collect::<Result<_, _>>().map(Self)
    }

    /// Whether the event matches. A field that it does not have matches nothing.
    #[must_use]
    pub fn matches(&self, event: &Value) -> bool {
        self.0.iter().all(|(name, node)| match (event.get(name), node) {
            (Some(value), Node::Fields(pattern)) => pattern.matches(value),
            (Some(value), Node::OneOf(tests)) => tests.iter().any(|test| match test {
                Test::Exact(exact) => value == exact,
                Test::Prefix(prefix) => value.as_str().is_some_and(|text| text.starts_with(prefix)),
            }),
            (None, _) => false,
        })
    }
}

fn test(at: &str, value: &Value) -> Result<Test, String> {
    match value {
        Value::Object(rule) => match (rule.len(), rule.get("prefix")) {
            (1, Some(Value::String(prefix))) => Ok(Test::Prefix(prefix.clone())),
            _ => Err(format!("`{at}`: the rule {value} is not known to the local stack")),
        },
        Value::Array(_) => Err(format!("`{at}`: a list in a list is no value")),
        exact => Ok(Test::Exact(exact.clone())),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_named_field_has_to_match_one_of_its_values() {
        let pattern = json!({
            "eventName": ["INSERT", "MODIFY"],
            "dynamodb": {"Keys": {"sk": {"S": [{"prefix": "USAGE#"}, "TOTAL"]}}},
        });
        let pattern = Pattern::parse(&pattern).unwrap();
        let event = |name: &str, key: Value| json!({"eventName": name, "dynamodb": {"Keys": {"sk": key}}});
        assert!(pattern.matches(&event("INSERT", json!({"S": "USAGE#1"}))));
        assert!(pattern.matches(&event("MODIFY", json!({"S": "TOTAL"}))));
        assert!(!pattern.matches(&event("REMOVE", json!({"S": "TOTAL"}))));
        assert!(!pattern.matches(&event("INSERT", json!({"S": "TOTALS"}))));
        assert!(!pattern.matches(&event("INSERT", json!({"N": "1"}))));
        assert!(!pattern.matches(&json!({"eventName": "INSERT"})));
        assert!(Pattern::parse(&json!({})).unwrap().matches(&json!({"any": "thing"})));
    }

    #[test]
    fn what_is_not_known_is_named() {
        let problem = |pattern: Value| Pattern::parse(&pattern).unwrap_err();
        assert_eq!(
            problem(json!({"a": {"b": [{"suffix": "x"}]}})),
            r#"`a.b`: the rule {"suffix":"x"} is not known to the local stack"#
        );
        assert_eq!(problem(json!({"a": "x"})), "`a` is neither a list of values nor a map");
        assert_eq!(problem(json!({"$or": {}})), "`$or` is neither a list of values nor a map");
        assert_eq!(problem(json!([])), "`` is not a map");
    }
}

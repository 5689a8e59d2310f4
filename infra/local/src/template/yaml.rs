//! CloudFormation's YAML as JSON: short tags become their long forms.

use std::path::Path;

use serde_json::{Map, Number, Value};
use serde_yaml_ng::Value as Yaml;
use serde_yaml_ng::value::TaggedValue;

use super::{TemplateError, invalid};

/// Reads a YAML file.
pub(super) fn read(path: &Path) -> Result<Value, TemplateError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| TemplateError::Read { path: path.to_owned(), source })?;
    let yaml: Yaml = serde_yaml_ng::from_str(&text)
        .map_err(|source| TemplateError::Yaml { path: path.to_owned(), source })?;
    let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    long_form(&file, yaml)
}

fn long_form(at: &str, yaml: Yaml) -> Result<Value, TemplateError> {
    Ok(match yaml {
        Yaml::Null => Value::Null,
        Yaml::Bool(flag) => Value::Bool(flag),
        Yaml::Number(number) => {
            Value::Number(json_number(&number).ok_or_else(|| invalid(at, "is not a number"))?)
        }
        Yaml::String(text) => Value::String(text),
        Yaml::Sequence(items) => Value::Array(
            items
                .into_iter()
                .enumerate()
                .map(|(index, item)| long_form(&format!("{at}.{index}"), item))
                .collect::<Result<_, _>>()?,
        ),
        Yaml::Mapping(mapping) => {
            let mut object = Map::new();
            for (key, value) in mapping {
                let key = match key {
                    Yaml::String(text) => text,
                    Yaml::Number(number) => number.to_string(),
                    Yaml::Bool(flag) => flag.to_string(),
                    _ => return Err(invalid(at, "has a key that is not text")),
                };
                let value = long_form(&format!("{at}.{key}"), value)?;
                object.insert(key, value);
            }
            Value::Object(object)
        }
        Yaml::Tagged(tagged) => intrinsic(at, *tagged)?,
    })
}

fn intrinsic(at: &str, tagged: TaggedValue) -> Result<Value, TemplateError> {
    let tag = tagged.tag.to_string();
    let name = tag.trim_start_matches('!');
    let argument = long_form(at, tagged.value)?;
    let (key, argument) = match (name, argument) {
        ("Ref" | "Condition", argument) => (name.to_owned(), argument),
        // The one short form whose argument is written differently.
        ("GetAtt", Value::String(text)) => {
            let (resource, attribute) = text
                .split_once('.')
                .ok_or_else(|| invalid(at, format!("!GetAtt {text} names no attribute")))?;
            ("Fn::GetAtt".to_owned(), Value::from(vec![resource, attribute]))
        }
        (_, argument) => (format!("Fn::{name}"), argument),
    };
    Ok(Value::Object(Map::from_iter([(key, argument)])))
}

fn json_number(number: &serde_yaml_ng::Number) -> Option<Number> {
    if let Some(integer) = number.as_i64() {
        return Some(integer.into());
    }
    if let Some(integer) = number.as_u64() {
        return Some(integer.into());
    }
    Number::from_f64(number.as_f64()?)
}

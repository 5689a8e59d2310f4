//! CloudFormation's intrinsic functions.

use std::collections::BTreeMap;
use std::path::Path;

use regex::Regex;
use serde_json::{Map, Value};

use super::{
    ACCOUNT, API_ID, REGION, Resource, STACK, TemplateError, events, function_role_arn, invalid, layer_arn,
    name_property, role_arn, scalar, secret_arn, yaml,
};

/// Deep enough for any template, shallow enough that a cycle is an error and not an overflow.
const MAX_DEPTH: usize = 64;

/// Evaluates one template. A value of `None` is `AWS::NoValue`: whatever holds it drops it.
pub(super) struct Evaluator<'a> {
    template: &'a Value,
    folder: &'a Path,
    parameters: BTreeMap<String, Value>,
}

impl<'a> Evaluator<'a> {
    pub(super) fn new(
        template: &'a Value,
        folder: &'a Path,
        overrides: &BTreeMap<String, String>,
    ) -> Result<Self, TemplateError> {
        let empty = Map::new();
        let declared = template.get("Parameters").and_then(Value::as_object).unwrap_or(&empty);
        if let Some(unknown) = overrides.keys().find(|name| !declared.contains_key(*name)) {
            return Err(invalid(format!("Parameters.{unknown}"), "is not declared, but a value is given"));
        }
        let mut parameters = BTreeMap::new();
        for (name, declaration) in declared {
            let at = format!("Parameters.{name}");
            parameters.insert(name.clone(), parameter(&at, declaration, overrides.get(name))?);
        }
        Ok(Self { template, folder, parameters })
    }

    /// The resources whose condition holds, with their properties evaluated.
    pub(super) fn resources(&self) -> Result<Vec<Resource>, TemplateError> {
        let mut resources = Vec::new();
        let declared = self.template.get("Resources").and_then(Value::as_object);
        for (id, resource) in declared.into_iter().flatten() {
            let at = format!("Resources.{id}");
            let kind =
                resource.get("Type").and_then(Value::as_str).ok_or_else(|| invalid(&at, "has no Type"))?;
            if let Some(Value::String(condition)) = resource.get("Condition")
                && !self.condition(condition, &at, 0)?
            {
                continue;
            }
            resources.push(Resource {
                id: id.clone(),
                kind: kind.to_owned(),
                properties: self.section(&format!("{at}.Properties"), resource.get("Properties"))?,
                metadata: self.section(&format!("{at}.Metadata"), resource.get("Metadata"))?,
            });
        }
        Ok(resources)
    }

    /// The template's outputs, as text.
    pub(super) fn outputs(&self) -> Result<BTreeMap<String, String>, TemplateError> {
        let mut outputs = BTreeMap::new();
        let declared = self.template.get("Outputs").and_then(Value::as_object);
        for (name, output) in declared.into_iter().flatten() {
            let at = format!("Outputs.{name}.Value");
            let value = self.section(&at, output.get("Value"))?;
            outputs.insert(name.clone(), scalar(&value).ok_or_else(|| invalid(at, "is not text"))?);
        }
        Ok(outputs)
    }

    /// One part of the template, evaluated; null where there is none.
    pub(super) fn section(&self, at: &str, value: Option<&Value>) -> Result<Value, TemplateError> {
        match value {
            None => Ok(Value::Null),
            Some(value) => Ok(self.value(value, at, 0)?.unwrap_or(Value::Null)),
        }
    }

    fn value(&self, value: &Value, at: &str, depth: usize) -> Result<Option<Value>, TemplateError> {
        if depth > MAX_DEPTH {
            return Err(invalid(at, "is nested too deeply, or refers to itself"));
        }
        let depth = depth + 1;
        match value {
            Value::Array(items) => {
                let mut evaluated = Vec::with_capacity(items.len());
                for (index, item) in items.iter().enumerate() {
                    evaluated.extend(self.value(item, &format!("{at}.{index}"), depth)?);
                }
                Ok(Some(Value::Array(evaluated)))
            }
            Value::Object(object) => match single(object) {
                Some(("Ref", argument)) => self.reference(argument, at, depth),
                Some((name, argument)) if name.starts_with("Fn::") => self.call(name, argument, at, depth),
                _ => {
                    let mut evaluated = Map::new();
                    for (key, item) in object {
                        if key.starts_with("Fn::") {
                            return Err(invalid(at, format!("`{key}` stands beside other keys")));
                        }
                        if let Some(item) = self.value(item, &format!("{at}.{key}"), depth)? {
                            evaluated.insert(key.clone(), item);
                        }
                    }
                    Ok(Some(Value::Object(evaluated)))
                }
            },
            other => Ok(Some(other.clone())),
        }
    }

    fn call(
        &self,
        name: &str,
        argument: &Value,
        at: &str,
        depth: usize,
    ) -> Result<Option<Value>, TemplateError> {
        match name {
            "Fn::Sub" => self.substitute(argument, at, depth).map(Some),
            "Fn::GetAtt" => {
                let (resource, attribute) = match argument {
                    Value::Array(parts) => match parts.as_slice() {
                        [Value::String(resource), Value::String(attribute)] => {
                            (resource.as_str(), attribute.as_str())
                        }
                        _ => return Err(invalid(at, "Fn::GetAtt takes a resource and an attribute")),
                    },
                    Value::String(text) => text
                        .split_once('.')
                        .ok_or_else(|| invalid(at, format!("Fn::GetAtt {text} names no attribute")))?,
                    _ => return Err(invalid(at, "Fn::GetAtt takes a resource and an attribute")),
                };
                self.attribute(resource, attribute, at, depth).map(Some)
            }
            "Fn::Join" => match argument.as_array().map(Vec::as_slice) {
                Some([Value::String(delimiter), list]) => {
                    let parts = self.value(list, at, depth)?;
                    let parts = parts
                        .as_ref()
                        .and_then(Value::as_array)
                        .and_then(|parts| parts.iter().map(scalar).collect::<Option<Vec<_>>>())
                        .ok_or_else(|| invalid(at, "Fn::Join joins texts"))?;
                    Ok(Some(Value::String(parts.join(delimiter))))
                }
                _ => Err(invalid(at, "Fn::Join takes a delimiter and a list")),
            },
            "Fn::Split" => match argument.as_array().map(Vec::as_slice) {
                Some([Value::String(delimiter), text]) if !delimiter.is_empty() => {
                    let text = self.value(text, at, depth)?.as_ref().and_then(scalar);
                    let text = text.ok_or_else(|| invalid(at, "Fn::Split splits a text"))?;
                    Ok(Some(text.split(delimiter.as_str()).map(Value::from).collect()))
                }
                _ => Err(invalid(at, "Fn::Split takes a delimiter and a text")),
            },
            "Fn::If" => match argument.as_array().map(Vec::as_slice) {
                Some([Value::String(condition), then, otherwise]) => {
                    let chosen = if self.condition(condition, at, depth)? { then } else { otherwise };
                    self.value(chosen, at, depth)
                }
                _ => Err(invalid(at, "Fn::If takes a condition's name and two values")),
            },
            "Fn::Transform" => {
                let name = argument.get("Name").and_then(Value::as_str).unwrap_or_default();
                let location = argument.pointer("/Parameters/Location").and_then(Value::as_str);
                match (name, location) {
                    ("AWS::Include", Some(location)) => {
                        let included = yaml::read(&self.folder.join(location))?;
                        self.value(&included, &format!("{at}({location})"), depth)
                    }
                    _ => Err(invalid(at, format!("transform `{name}` is not known to the local stack"))),
                }
            }
            other => Err(invalid(at, format!("`{other}` is not known to the local stack"))),
        }
    }

    fn reference(&self, argument: &Value, at: &str, depth: usize) -> Result<Option<Value>, TemplateError> {
        let name = argument.as_str().ok_or_else(|| invalid(at, "Ref takes a name"))?;
        if name == "AWS::NoValue" {
            return Ok(None);
        }
        self.named(name, at, depth).map(Some)
    }

    /// A parameter, a pseudo parameter, or what `Ref` says of a resource.
    fn named(&self, name: &str, at: &str, depth: usize) -> Result<Value, TemplateError> {
        let pseudo = match name {
            "AWS::Region" => Some(REGION.to_owned()),
            "AWS::AccountId" => Some(ACCOUNT.to_owned()),
            "AWS::Partition" => Some("aws".to_owned()),
            "AWS::URLSuffix" => Some("amazonaws.com".to_owned()),
            "AWS::StackName" => Some(STACK.to_owned()),
            "AWS::StackId" => Some(format!("arn:aws:cloudformation:{REGION}:{ACCOUNT}:stack/{STACK}/local")),
            _ => None,
        };
        if let Some(value) = pseudo {
            return Ok(Value::String(value));
        }
        if let Some(value) = self.parameters.get(name) {
            return Ok(value.clone());
        }
        let kind = self.kind(name).ok_or_else(|| {
            invalid(at, format!("`{name}` is neither a parameter nor a resource of the template"))
        })?;
        let value = match kind {
            "AWS::Serverless::Api" => API_ID.to_owned(),
            // CloudFormation makes an id up.
            "AWS::ApiGateway::Account" => format!("{STACK}-{name}"),
            // Secrets Manager's `Ref` is the ARN.
            "AWS::SecretsManager::Secret" => return self.attribute(name, "Arn", at, depth),
            // A layer's is one version's.
            "AWS::Serverless::LayerVersion" => {
                format!("{}:1", layer_arn(&self.name_of(name, kind, at, depth)?))
            }
            // SQS's is the address.
            "AWS::SQS::Queue" => {
                let queue = self.name_of(name, kind, at, depth)?;
                format!("https://sqs.{REGION}.amazonaws.com/{ACCOUNT}/{queue}")
            }
            _ => self.name_of(name, kind, at, depth)?,
        };
        Ok(Value::String(value))
    }

    fn attribute(
        &self,
        resource: &str,
        attribute: &str,
        at: &str,
        depth: usize,
    ) -> Result<Value, TemplateError> {
        // SAM makes a role for each function, under the function's name.
        if let Some(function) = resource.strip_suffix("Role")
            && self.kind(function) == Some("AWS::Serverless::Function")
            && (self.kind(resource), attribute) == (None, "Arn")
        {
            return Ok(Value::String(function_role_arn(function)));
        }
        let kind = self
            .kind(resource)
            .ok_or_else(|| invalid(at, format!("`{resource}` is not a resource of the template")))?;
        let name = self.name_of(resource, kind, at, depth)?;
        let arn = |service: &str, rest: String| format!("arn:aws:{service}:{REGION}:{ACCOUNT}:{rest}");
        let value = match (kind, attribute) {
            ("AWS::Serverless::Function", "Arn") => arn("lambda", format!("function:{name}")),
            ("AWS::DynamoDB::Table", "Arn") => arn("dynamodb", format!("table/{name}")),
            ("AWS::DynamoDB::Table", "StreamArn") => events::stream_arn(&name),
            ("AWS::SQS::Queue", "Arn") => events::queue_arn(&name),
            ("AWS::SQS::Queue", "QueueName") => name,
            ("AWS::S3::Bucket", "Arn") => format!("arn:aws:s3:::{name}"),
            ("AWS::SecretsManager::Secret", "Arn" | "Id") => secret_arn(&name),
            ("AWS::IAM::Role", "Arn") => role_arn(&name),
            ("AWS::Logs::LogGroup", "Arn") => arn("logs", format!("log-group:{name}:*")),
            _ => {
                let problem = format!("`{resource}.{attribute}` of a {kind} is not known to the local stack");
                return Err(invalid(at, problem));
            }
        };
        Ok(Value::String(value))
    }

    fn name_of(&self, resource: &str, kind: &str, at: &str, depth: usize) -> Result<String, TemplateError> {
        let property = name_property(kind).ok_or_else(|| {
            invalid(at, format!("what `{resource}`, a {kind}, is called is not known here"))
        })?;
        let declared = self.template.pointer(&format!("/Resources/{resource}/Properties/{property}"));
        let Some(declared) = declared else { return Ok(format!("{STACK}-{resource}")) };
        let at = format!("Resources.{resource}.Properties.{property}");
        let value = self.value(declared, &at, depth)?;
        value.as_ref().and_then(scalar).ok_or_else(|| invalid(at, "is not text"))
    }

    fn kind(&self, resource: &str) -> Option<&'a str> {
        self.template.get("Resources")?.get(resource)?.get("Type")?.as_str()
    }

    /// `${Name}`, `${Name.Attribute}`, `${Local}` from the second argument, and `${!Literal}`.
    fn substitute(&self, argument: &Value, at: &str, depth: usize) -> Result<Value, TemplateError> {
        let empty = Map::new();
        let (text, locals) = match argument {
            Value::String(text) => (text, &empty),
            Value::Array(parts) => match parts.as_slice() {
                [Value::String(text), Value::Object(locals)] => (text, locals),
                _ => return Err(invalid(at, "Fn::Sub takes a text and a map")),
            },
            _ => return Err(invalid(at, "Fn::Sub takes a text")),
        };
        let mut result = String::with_capacity(text.len());
        let mut rest = text.as_str();
        while let Some((before, after)) = rest.split_once("${") {
            result.push_str(before);
            let (name, after) =
                after.split_once('}').ok_or_else(|| invalid(at, "Fn::Sub has a `${` without its `}`"))?;
            rest = after;
            if let Some(literal) = name.strip_prefix('!') {
                result.push_str(&format!("${{{literal}}}"));
                continue;
            }
            let value = match (locals.get(name), name.split_once('.')) {
                (Some(local), _) => self.value(local, at, depth)?.unwrap_or(Value::Null),
                (None, Some((resource, attribute))) => self.attribute(resource, attribute, at, depth)?,
                (None, None) => self.named(name, at, depth)?,
            };
            result.push_str(&scalar(&value).ok_or_else(|| invalid(at, format!("`{name}` is not text")))?);
        }
        result.push_str(rest);
        Ok(Value::String(result))
    }

    fn condition(&self, name: &str, at: &str, depth: usize) -> Result<bool, TemplateError> {
        let declared = self
            .template
            .get("Conditions")
            .and_then(|conditions| conditions.get(name))
            .ok_or_else(|| invalid(at, format!("condition `{name}` is not declared")))?;
        self.predicate(declared, &format!("Conditions.{name}"), depth)
    }

    fn predicate(&self, value: &Value, at: &str, depth: usize) -> Result<bool, TemplateError> {
        if depth > MAX_DEPTH {
            return Err(invalid(at, "is nested too deeply, or refers to itself"));
        }
        let depth = depth + 1;
        let list = |argument: &'_ Value| argument.as_array().cloned().unwrap_or_default();
        match value.as_object().and_then(single) {
            Some(("Condition", Value::String(name))) => self.condition(name, at, depth),
            Some(("Fn::Equals", argument)) => match list(argument).as_slice() {
                [left, right] => Ok(self.value(left, at, depth)? == self.value(right, at, depth)?),
                _ => Err(invalid(at, "Fn::Equals takes two values")),
            },
            Some(("Fn::Not", argument)) => match list(argument).as_slice() {
                [inner] => Ok(!self.predicate(inner, at, depth)?),
                _ => Err(invalid(at, "Fn::Not takes one condition")),
            },
            Some(("Fn::And", argument)) => list(argument)
                .iter()
                .try_fold(true, |all, inner| Ok(all && self.predicate(inner, at, depth)?)),
            Some(("Fn::Or", argument)) => list(argument)
                .iter()
                .try_fold(false, |any, inner| Ok(any || self.predicate(inner, at, depth)?)),
            _ => Err(invalid(at, "is not a condition known to the local stack")),
        }
    }
}

fn single(object: &Map<String, Value>) -> Option<(&str, &Value)> {
    let mut entries = object.iter();
    match (entries.next(), entries.next()) {
        (Some((key, value)), None) => Some((key.as_str(), value)),
        _ => None,
    }
}

fn parameter(at: &str, declaration: &Value, given: Option<&String>) -> Result<Value, TemplateError> {
    let kind = declaration.get("Type").and_then(Value::as_str).unwrap_or_default();
    let text = match (given, declaration.get("Default")) {
        (Some(given), _) => given.clone(),
        (None, Some(default)) => {
            scalar(default).ok_or_else(|| invalid(at, "has a Default that is not text"))?
        }
        (None, None) => return Err(invalid(at, "has no default, and no value is given")),
    };
    let refuse = |rule: String| Err(invalid(at, format!("`{text}` {rule}")));
    if let Some(pattern) = declaration.get("AllowedPattern").and_then(Value::as_str) {
        // CloudFormation matches the whole value.
        let regex = Regex::new(&format!("^(?:{pattern})$"))
            .map_err(|error| invalid(at, format!("AllowedPattern cannot be used: {error}")))?;
        if !regex.is_match(&text) {
            let wanted = declaration.get("ConstraintDescription").and_then(Value::as_str).unwrap_or(pattern);
            return refuse(format!("is not {wanted}"));
        }
    }
    if let Some(Value::Array(allowed)) = declaration.get("AllowedValues")
        && !allowed.iter().filter_map(scalar).any(|value| value == text)
    {
        return refuse("is not one of the allowed values".to_owned());
    }
    match kind {
        "String" => {}
        "Number" => {
            let Ok(number) = text.parse::<f64>() else { return refuse("is not a number".to_owned()) };
            let bound =
                |name: &str| declaration.get(name).and_then(scalar).and_then(|bound| bound.parse().ok());
            if bound("MinValue").is_some_and(|least: f64| number < least)
                || bound("MaxValue").is_some_and(|most: f64| number > most)
            {
                return refuse("is out of range".to_owned());
            }
        }
        other => {
            return Err(invalid(at, format!("parameter type `{other}` is not known to the local stack")));
        }
    }
    Ok(Value::String(text))
}

//! Holds JSON to a schema: those words of JSON Schema that the project's schemas use. An unknown word is an error, so
//! that none is passed over.

use serde_json::Value;

/// What is wrong with a value, each with its place; empty if it fits.
pub fn problems(schema: &Value, value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    check(schema, schema, value, "$", &mut found);
    found
}

/// Words that say nothing about a value.
const REMARKS: [&str; 4] = ["$schema", "$defs", "title", "description"];

fn check(root: &Value, schema: &Value, value: &Value, place: &str, found: &mut Vec<String>) {
    for (word, rule) in schema.as_object().expect("a schema is an object") {
        let fits = match word.as_str() {
            word if REMARKS.contains(&word) => true,
            "$ref" => {
                let pointer = rule.as_str().and_then(|r| r.strip_prefix('#')).expect("a reference into this schema");
                check(root, root.pointer(pointer).expect("it exists"), value, place, found);
                true
            }
            "oneOf" => {
                let fits = |schema: &&Value| {
                    let mut found = Vec::new();
                    check(root, schema, value, place, &mut found);
                    found.is_empty()
                };
                rule.as_array().expect("a list").iter().filter(fits).count() == 1
            }
            "type" => match rule.as_str().expect("one type") {
                "object" => value.is_object(),
                "array" => value.is_array(),
                "string" => value.is_string(),
                "integer" => value.is_i64(),
                other => panic!("the type `{other}` is not known here"),
            },
            "const" => value == rule,
            "enum" => rule.as_array().expect("a list").contains(value),
            "minimum" => value.as_i64() >= rule.as_i64(),
            "pattern" => matches(rule.as_str().expect("a pattern"), value.as_str().unwrap_or_default()),
            "required" => {
                let names = rule.as_array().expect("a list").iter().filter_map(Value::as_str);
                names.into_iter().all(|name| value.get(name).is_some())
            }
            "properties" => {
                for (name, schema) in rule.as_object().expect("an object") {
                    if let Some(value) = value.get(name) {
                        check(root, schema, value, &format!("{place}.{name}"), found);
                    }
                }
                true
            }
            "additionalProperties" => {
                let known = schema["properties"].as_object().expect("properties");
                *rule == Value::Bool(true) || value.as_object().is_none_or(|v| v.keys().all(|k| known.contains_key(k)))
            }
            "items" => {
                for (n, item) in value.as_array().into_iter().flatten().enumerate() {
                    check(root, rule, item, &format!("{place}[{n}]"), found);
                }
                true
            }
            other => panic!("the word `{other}` is not known here"),
        };
        if !fits {
            found.push(format!("{place}: `{word}` is {rule}, and this is {value}"));
        }
    }
}

/// The two patterns that are used, by hand.
fn matches(pattern: &str, text: &str) -> bool {
    match pattern {
        "^[0-9a-f]{12}$" => text.len() == 12 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')),
        "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z$" => demae::model::time::Timestamp::parse(text).is_some(),
        other => panic!("the pattern `{other}` is not known here"),
    }
}

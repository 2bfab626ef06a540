//! Checks the documentation against the tests.

use std::{fs, path::Path};

/// The numbers of the faults in the table.
const FAULTS: std::ops::RangeInclusive<usize> = 1..=116;

fn text(path: &str) -> Option<String> {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).ok()
}

/// True if a file has a test of this name: a function, or a target of the fuzzing macro.
fn has_test(file: &str, name: &str) -> bool {
    let Some(source) = text(file) else { return false };
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let heads = [format!("fn {name}("), format!("async fn {name}(")];
    let function = lines.iter().enumerate().any(|(n, line)| {
        let above = &lines[n.saturating_sub(4)..n];
        heads.iter().any(|head| line.starts_with(head.as_str()))
            && above.iter().any(|l| l.starts_with("#[test]"))
            && !above.iter().any(|l| l.starts_with("#[ignore"))
    });
    let target = lines.iter().any(|l| {
        l.strip_prefix("targets!(")
            .is_some_and(|l| l.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == name))
    });
    function || target
}

#[test]
fn every_fault_has_a_row_and_every_named_test_exists() {
    let docs = text("docs/failure-modes.md").expect("the documentation");
    let mut numbers = Vec::new();
    let mut wrong = Vec::new();
    for line in docs.lines() {
        let Some((number, rest)) = line.strip_prefix("| ").and_then(|l| l.split_once(" | ")) else { continue };
        let Ok(number) = number.parse::<usize>() else { continue };
        numbers.push(number);
        let proofs = rest.trim_end().trim_end_matches('|').rsplit(" | ").next().unwrap_or_default();
        let named: Vec<(&str, &str)> = proofs
            .split('`')
            .filter_map(|part| part.split_once("::"))
            .filter(|(file, _)| file.contains(".rs"))
            .collect();
        if named.is_empty() {
            wrong.push(format!("fault {number} names no test"));
        }
        for (file, name) in named {
            if !has_test(file, name) {
                wrong.push(format!("fault {number} names `{file}::{name}`, which does not exist"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(numbers, FAULTS.collect::<Vec<_>>());
}

#[test]
fn missing_test_is_detected() {
    assert!(has_test("tests/pure/documented.rs", "missing_test_is_detected"));
    assert!(!has_test("tests/pure/documented.rs", "has_test"), "a function that is no test");
    assert!(!has_test("tests/pure/documented.rs", "no_such_test"));
    assert!(!has_test("tests/nowhere.rs", "no_such_test"));
}

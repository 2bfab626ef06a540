//! The agent's trust in its store: status, `demae init`, and simple specs.

use std::process::Output;

use demae::model::status::{State, StoreBlock};

use super::{lab::Lab, wait::until};

/// Why the store is quarantined, if it is.
pub fn block(lab: &Lab) -> Option<StoreBlock> {
    lab.status()?.store.block
}

/// Waits until it is quarantined for this reason.
pub fn wait_block(lab: &Lab, kind: &str) -> StoreBlock {
    let mut found = None;
    until(&format!("the store is quarantined: {kind}"), || {
        found = block(lab).filter(|b| b.kind == kind);
        found.is_some()
    });
    found.expect("a block")
}

/// Runs `demae init`.
pub fn init(lab: &Lab) {
    let output = lab.demae(&["init"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Everything that a command printed.
pub fn output_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Specs of apps without ingress.
pub fn workers<const N: usize>(lab: &Lab, names: [&str; N]) -> [(String, String); N] {
    let worker = format!("image: \"{}\"\nstop_grace_period: 1s\n", lab.image("v1"));
    names.map(|name| (format!("apps/{name}/spec"), worker.clone()))
}

/// True if the host has this many apps and all have converged.
pub fn all_converged(lab: &Lab, count: usize) -> bool {
    lab.status().is_some_and(|s| s.apps.len() == count && s.apps.iter().all(|a| a.state == State::Converged))
}

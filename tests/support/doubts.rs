//! What is asked of an agent about its store.

use std::process::Output;

use demae::model::status::{State, StoreBlock};

use super::{lab::Lab, wait::until};

/// Why what the store says is not believed, if it is not.
pub fn block(lab: &Lab) -> Option<StoreBlock> {
    lab.status()?.store.block
}

/// Waits until it is not believed for this reason.
pub fn wait_block(lab: &Lab, kind: &str) -> StoreBlock {
    let mut found = None;
    until(&format!("the store is not believed: {kind}"), || {
        found = block(lab).filter(|b| b.kind == kind);
        found.is_some()
    });
    found.expect("a block")
}

/// Gives the store its identity.
pub fn init(lab: &Lab) {
    let output = lab.demae(&["init"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// All that a command printed.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Specs of apps that take no requests.
pub fn workers<const N: usize>(lab: &Lab, names: [&str; N]) -> [(String, String); N] {
    let worker = format!("image: \"{}\"\nstop_grace_period: 1s\n", lab.image("v1"));
    names.map(|name| (format!("apps/{name}/spec"), worker.clone()))
}

/// Whether this many apps are here, and all as they should be.
pub fn all_run(lab: &Lab, count: usize) -> bool {
    lab.status().is_some_and(|s| s.apps.len() == count && s.apps.iter().all(|a| a.state == State::Converged))
}

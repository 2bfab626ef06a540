//! The reference of all commands and their options, made from the command line itself: `docs/options.md`.

use std::collections::BTreeMap;

use clap::{Arg, Command};

const HEAD: &str = "# Options

All commands with their arguments and options, as `--help` prints them. [cli.md](cli.md) says what the commands do.

This page is made from the program: `UPDATE_EXPECT=1 cargo test --lib every_option`.
";

/// Options that several commands share, by their heading in `--help`.
type Groups = BTreeMap<String, Vec<String>>;

/// The whole page.
pub(super) fn text(mut root: Command) -> String {
    root.build();
    let (mut groups, mut commands) = (Groups::new(), String::new());
    for command in root.get_subcommands().filter(|command| command.get_name() != "help") {
        add(&mut commands, &mut groups, "demae", command);
    }
    let mut page = HEAD.to_owned();
    for (heading, rows) in groups {
        page.push_str(&format!("\n## {heading}\n\n{}", table(&rows)));
    }
    page + &commands
}

fn add(page: &mut String, groups: &mut Groups, parent: &str, command: &Command) {
    let name = format!("{parent} {}", command.get_name());
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    page.push_str(&format!("\n## {name}\n\n{about}.\n"));
    let mut own = Vec::new();
    // `--help` and `--version` are everywhere.
    let args = command.get_arguments().filter(|arg| !matches!(arg.get_id().as_str(), "help" | "version"));
    let mut args: Vec<&Arg> = args.filter(|arg| !arg.is_hide_set()).collect();
    args.sort_by_key(|arg| arg.get_index().unwrap_or(usize::MAX));
    let mut links = Vec::new();
    for arg in args {
        let Some(heading) = arg.get_help_heading() else {
            own.push(row(arg));
            continue;
        };
        let group = groups.entry(heading.to_owned()).or_default();
        if !group.contains(&row(arg)) {
            group.push(row(arg));
        }
        let link = format!("[{heading}](#{})", heading.to_lowercase());
        if !links.contains(&link) {
            links.push(link);
        }
    }
    if !own.is_empty() {
        page.push_str(&format!("\n{}", table(&own)));
    }
    if !links.is_empty() {
        page.push_str(&format!("\nAlso the options under {}.\n", links.join(", ")));
    }
    for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
        add(page, groups, &name, below);
    }
}

fn table(rows: &[String]) -> String {
    format!("| option | environment | default | |\n|---|---|---|---|\n{}\n", rows.join("\n"))
}

fn row(arg: &Arg) -> String {
    let values: Vec<String> = arg.get_value_names().unwrap_or_default().iter().map(ToString::to_string).collect();
    let takes_value = arg.get_action().takes_values();
    let value = if takes_value { values.join(" ") } else { String::new() };
    let name = match (arg.get_short(), arg.get_long()) {
        (Some(short), Some(long)) => format!("-{short}, --{long} {value}"),
        (Some(short), None) => format!("-{short} {value}"),
        (None, Some(long)) => format!("--{long} {value}"),
        (None, None) => value,
    };
    let env = arg.get_env().map(|env| format!("`{}`", env.to_string_lossy())).unwrap_or_default();
    let defaults: Vec<_> =
        arg.get_default_values().iter().map(|text| format!("`{}`", text.to_string_lossy())).collect();
    let default = if takes_value { defaults.join(", ") } else { String::new() };
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let possible: Vec<String> = match takes_value {
        true => arg.get_possible_values().iter().map(|value| format!("`{}`", value.get_name())).collect(),
        false => Vec::new(),
    };
    let possible = if possible.is_empty() { String::new() } else { format!(": {}", possible.join(", ")) };
    format!("| `{}` | {env} | {default} | {} |", name.trim(), format!("{help}{possible}").replace('|', "\\|"))
}

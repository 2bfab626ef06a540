//! `demae adopt`

use super::{Common, Ended, Exit, Failed, print::Printer, setup};
use crate::{
    config::Config,
    host::{files, layout::Layout},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The agent id that `status` and `doctor` show; `none` for containers without one
    #[arg(value_name = "ID")]
    id: String,
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let is_id = |id: &str| id == "none" || id.len() == 16 && id.bytes().all(|b| b.is_ascii_hexdigit());
    if !is_id(&args.id) {
        return Err(Failed::usage(format!(
            "`{}` is not an agent id: 16 hexadecimal digits, or `none`; `demae status` shows it",
            args.id.escape_debug()
        )));
    }
    let config = Config::load(&args.common)?;
    let layout = Layout::new(&config.state_dir, &config.run_dir);
    let mut ids = setup::adopted(&layout)?;
    if setup::agent_id(&layout)?.as_deref() == Some(args.id.as_str()) || ids.contains(&args.id) {
        printer.line("the containers of that agent are adopted already");
        return Ok(Exit::Success);
    }
    ids.push(args.id.clone());
    let text: String = ids.iter().map(|id| format!("{id}\n")).collect();
    files::write(&layout.adopted(), text.as_bytes(), 0o644)?;
    printer.line(&format!(
        "the containers of agent {} on this engine, with the name `{}`, are this agent's from now on; make sure that the other agent is stopped",
        args.id, config.host
    ));
    Ok(Exit::Success)
}

//! `demae init`

use super::{Common, Ended, Exit, Failed, print::Printer, runtime};
use crate::{config, store};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let etcd = config::etcd_only(&args.common)?;
    let key = etcd.prefix.key("cluster");
    let (id, made) = runtime(1)?.block_on(store::init(&etcd)).map_err(|e| Failed::try_later(e.to_string()))?;
    printer.line(&if made {
        format!("`{key}` is now `{id}`: agents identify the store by it, and do not trust a store without it")
    } else {
        format!("`{key}` is `{id}` already, and stays")
    });
    Ok(Exit::Success)
}
